"""The optimiser of step 2: Muon for the kernels, Adam for all other parameters."""

import torch

# The polynomial a s + b s^3 + c s^5, applied again and again, takes singular values s in (0, 1] towards 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalise the updates of the kernels; leave the other parameters to Adam.

    Adam gives all weights updates of similar size. Muon gives all singular values of a kernel's update a
    similar size (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). So no few directions
    dominate the update. torch.optim.Muon takes matrices only, not the kernels of convolutions.

    Both learning rates are in `param_groups`, so that one schedule scales both.

    Args:
        kernels: weights (out_channels, in_channels, height, width). Each counts as a matrix with
            `out_channels` rows.
        others: the other parameters.
        muon_rate: learning rate of the kernels. None gives them to Adam, too.
        learning_rate: learning rate of Adam, whose betas are 0.9 and 0.99.
        momentum: of the average over the gradients of the kernels.
    """

    def __init__(self, kernels, others, muon_rate, learning_rate, momentum=0.95):
        kernels, others = list(kernels), list(others)
        if muon_rate is None:
            kernels, others = [], others + kernels
        elif muon_rate <= 0:
            raise ValueError(f"muon_rate must be positive or None, not {muon_rate}")
        self.adam = torch.optim.Adam(others, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        groups = [dict(params=kernels, lr=muon_rate, momentum=momentum)] if kernels else []
        super().__init__([*self.adam.param_groups, *groups], {})
        self._share_with_adam()

    def _share_with_adam(self):
        """Let Adam update the first group, with the states that this optimiser saves and loads."""
        self.adam.param_groups, self.adam.state = self.param_groups[:1], self.state

    def load_state_dict(self, state_dict):
        """Load the states of all parameters and the learning rates."""
        super().load_state_dict(state_dict)
        self._share_with_adam()

    @torch.no_grad()
    def step(self):
        """Update all parameters."""
        self.adam.step()
        for group in self.param_groups[1:]:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                weight.sub_(orthogonalise(ahead.flatten(1)).view_as(weight), alpha=group["lr"])


def orthogonalise(matrix):
    """Return nearly U V^T for a matrix U S V^T of any scale.

    The singular values become 0.7 to 1.2; those below some thousandths of the matrix's norm stay smaller.
    Each Newton-Schulz iteration multiplies the matrix by a polynomial in the small product X X^T. So the
    iterations work on that product, (rows, rows), and the matrix is multiplied once at the end.
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
