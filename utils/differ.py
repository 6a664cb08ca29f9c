"""When two figures differ: if they lie more than two standard errors of their difference apart.

Means over the same images with the same pixels are compared in pairs, image by image. Metrics of samples have a
standard error each, by the jackknife. Runs with several seeds have the spread of the seeds.
"""

import math
import statistics


def differ(difference, error):
    """Tell whether a difference is more than chance, by its standard error."""
    return abs(difference) > 2 * error


def paired(values, others):
    """Return the mean difference of two lists of values of the same images, and its standard error."""
    differences = [value - other for value, other in zip(values, others)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def independent(value, error, other, other_error):
    """Return the difference of two figures with a standard error each, and its standard error."""
    return value - other, math.hypot(error, other_error)


def over_seeds(values, others):
    """Return the difference of the means over seeds, and its standard error. One side needs two runs or more.

    The spread is pooled: the variances of both, weighted by their degrees of freedom.
    """
    freedom = len(values) + len(others) - 2
    squares = sum(len(each) * statistics.pvariance(each) for each in (values, others))
    error = math.sqrt(squares / freedom * (1 / len(values) + 1 / len(others)))
    return statistics.fmean(values) - statistics.fmean(others), error
