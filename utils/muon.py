"""The optimiser of step 2: Muon for the kernels, Adam for all other parameters."""

import torch


class Muon(torch.optim.Adam):
    """Orthogonalise the updates of the kernels; leave the other parameters to Adam.

    So no few directions dominate an update (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    `kernels` are weights (out_channels, in_channels, height, width). With `muon_rate` None, Adam has them, too.
    """

    def __init__(self, kernels, others, muon_rate, learning_rate, momentum=0.95):
        if muon_rate is None:
            others, kernels = [*others, *kernels], []
        super().__init__(others, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        if kernels:
            self.add_param_group(dict(params=kernels, lr=muon_rate, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update all parameters."""
        groups = self.param_groups
        self.param_groups = groups[:1]  # Adam's
        super().step()
        self.param_groups = groups
        for group in groups[1:]:
            for weight in group["params"]:
                state = self.state[weight]
                state.setdefault("step", torch.zeros(()))  # Adam looks for it when it loads a state
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                weight.sub_(orthogonalise(ahead.flatten(1)).view_as(weight), alpha=group["lr"])


def split_parameters(network):
    """Return the kernels in `network.blocks`, which may be missing, for Muon and all other parameters for Adam."""
    kernels, others = [], []
    for name, parameter in network.named_parameters():
        is_kernel = name.startswith("blocks.") and name.endswith(".weight") and parameter.dim() == 4
        (kernels if is_kernel else others).append(parameter)
    return kernels, others


def orthogonalise(matrix):
    """Return nearly U V^T for a matrix U S V^T of any scale, by five iterations of Newton-Schulz.

    The singular values become 0.7 to 1.2; those below some thousandths of the matrix's norm stay smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # a s + b s^3 + c s^5 takes singular values s in (0, 1] towards 1
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.mT
    # The iterations work on the small product X X^T, and the matrix X is multiplied once at the end.
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(5):
        factor = a * identity + b * gram + c * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    return product @ matrix
