"""Muon, the optimiser of step 2's kernels."""

import torch

# Of the quintic a s + b s^3 + c s^5 that takes singular values in (0, 1] towards 1, as in the source.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised: every singular value of an update is about the learning rate.

    Where Adam evens out the sizes of the single entries, Muon evens out those of the directions of the linear map, so
    that a few large ones do not set the pace for all (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    It is meant for weights between features; other parameters are left to Adam. torch.optim.Muon, which torch has
    since 2.9, takes matrices alone.

    Args:
        params: weights of at least two dimensions. A kernel (out_channels, in_channels, height, width) counts as a
            matrix with a row for each output channel.
        lr: the learning rate.
        momentum: of the average over past gradients, with Nesterov's look ahead.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])
                weight.sub_(orthogonalised(ahead.flatten(1)).view_as(weight), alpha=group["lr"])


def orthogonalised(matrix):
    """Nearly U V^T for a matrix (rows, columns) = U S V^T, whatever its scale.

    Singular values become about 0.7 to 1.2; those below some thousandths of its norm stay smaller. Each Newton-Schulz
    iteration multiplies from the left by a polynomial in X X^T, so the iterations are done on that small product,
    (rows, rows), and the matrix is multiplied once.
    """
    a, b, c = COEFFICIENTS
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.mT
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    return product @ matrix
