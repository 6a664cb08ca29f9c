"""The optimiser of step 2: Muon for the kernels, Adam for all other parameters."""

import torch

ITERATIONS = 5  # of Newton-Schulz


class Muon(torch.optim.Optimizer):
    """Orthogonalise the updates of the kernels; leave the other parameters to Adam.

    Adam gives all weights updates of similar size. Muon gives all singular values of a kernel's update a
    similar size (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). So no few directions
    dominate the update. torch.optim.Muon takes matrices only, not the kernels of convolutions.

    Args:
        kernels: weights (out_channels, in_channels, height, width), as matrices with `out_channels` rows.
        others: the other parameters.
        muon_rate: learning rate of the kernels, at least 0. None gives them to Adam, too.
        learning_rate: learning rate of Adam. One schedule scales both rates, in `param_groups`.
    """

    def __init__(self, kernels, others, muon_rate, learning_rate, momentum=0.95):
        if muon_rate is not None and muon_rate < 0:
            raise ValueError(f"muon_rate must be at least 0 or None, not {muon_rate}")
        groups = [dict(params=kernels, lr=muon_rate, momentum=momentum)]
        if muon_rate is None:
            others, groups = [*others, *kernels], []
        self.adam = torch.optim.Adam(others, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        super().__init__([*self.adam.param_groups, *groups], {})

    @torch.no_grad()
    def step(self):
        """Update all parameters."""
        # Adam works on the first group, with the states that this optimiser saves and loads.
        self.adam.param_groups, self.adam.state = self.param_groups[:1], self.state
        self.adam.step()
        for group in self.param_groups[1:]:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                weight.sub_(orthogonalise(ahead.flatten(1)).view_as(weight), alpha=group["lr"])


def orthogonalise(matrix):
    """Return nearly U V^T for a matrix U S V^T of any scale.

    The singular values become 0.7 to 1.2; those below some thousandths of the matrix's norm stay smaller.
    Each iteration multiplies the matrix X by a polynomial in X X^T. So the iterations work on that small
    product, (rows, rows), and the matrix is multiplied once at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # a s + b s^3 + c s^5 takes singular values s in (0, 1] towards 1
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.mT
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    return product @ matrix
