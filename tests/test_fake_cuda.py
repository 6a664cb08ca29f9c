"""Runs on a GPU that is not there: everything on the wrong device fails. The other tests use the CPU alone.

torch's fake tensors have a shape, a type and a device, and no values. Backward passes do not work on them, so all
gradients are zero here.
"""

import copy
from typing import get_args

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils import _pytree as pytree

import hw2_step2_main as step2
from models import AR, ar_sampler
from models.classifier import Classifier
from results import train_classifier
from tests import children
from utils import cli, machine, metrics, pixelcnn_results, run

fake_tensors = pytest.importorskip("torch._subclasses.fake_tensor", reason="torch has no fake tensors")
aten, GPU = torch.ops.aten, torch.device("cuda", 0)


class FakeCuda(fake_tensors.FakeTensorMode):
    """Make all tensors on "cuda" fake. Tensors on the CPU stay real, and those sent from the GPU hold ones.

    A number read from the GPU is 0 or True. FakeTensorMode refuses tensors of two devices, but it accepts generators
    and indices of the wrong device. They are refused here, and so is float64, which MPS lacks.
    """

    is_inside = False  # an operation that is made of others

    def dispatch(self, func, types, args=(), kwargs=None):
        if self.is_inside:
            return super().dispatch(func, types, args, kwargs)
        leaves = pytree.tree_flatten((args, kwargs))[0]
        if not any(str(getattr(each, "device", each)).startswith("cuda") for each in leaves):
            return func(*args, **(kwargs or {}))
        assert not any(isinstance(each, torch.Generator) for each in leaves), "the CPU's generator on the GPU"
        self.is_inside = True
        try:
            return pytree.tree_map(self.receive, self.compute(func, types, args, kwargs))
        finally:
            self.is_inside = False

    def compute(self, func, types, args, kwargs):
        if func is aten._local_scalar_dense.default:  # item() and others
            return args[0].dtype is torch.bool or 0
        # The shapes of these results depend on values. One element is taken.
        if func is aten.nonzero.default:
            return self.places(args[0])
        if func is aten._unique2.default:
            return (args[0].new_zeros(1),) * 3
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert args[0].is_cuda, "indices on the GPU for a tensor on the CPU"
            masks = [each is not None and each.dtype is torch.bool for each in args[1]]
            parts = [self.places(each).unbind(1) if mask else (each,) for mask, each in zip(masks, args[1])]
            args = args[0], [each for part in parts for each in part], *args[2:]
        return super().dispatch(func, types, args, kwargs)

    def places(self, mask):
        is_fake = isinstance(mask, fake_tensors.FakeTensor)
        return mask.new_zeros(1, mask.dim(), dtype=torch.long) if is_fake else mask.nonzero()

    def receive(self, value):
        if not isinstance(value, fake_tensors.FakeTensor):
            return value
        assert not (value.is_cuda and value.dtype is torch.float64), "float64 on the GPU"
        return value if value.is_cuda else torch.ones(value.shape, dtype=value.dtype)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let the test find a GPU of fake tensors."""

    def zero_grad(optimizer):
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            parameter.grad = torch.zeros_like(parameter)

    def few_images(data_dir, dataset="MNIST", device="cpu", held_out=False):
        images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10
        return ((images.to(device), labels.to(device)),) * 2

    classifier = Classifier(channels=(2, 2)).eval()
    for owner, name, value in (
        (torch.optim.Optimizer, "zero_grad", zero_grad),
        (torch.Tensor, "backward", lambda loss: None),
        (torch.autograd, "grad", lambda y, x, **_: (torch.zeros_like(x),)),
        (torch, "save", lambda content, file: None),  # fake tensors have nothing to save
        (torch.cuda, "get_rng_state", torch.get_rng_state),
        (torch.cuda, "set_rng_state", lambda state: None),
        (machine, "find_device", lambda name: GPU),
        (machine, "hardware", str),
        (machine, "has_bfloat16_units", lambda device: False),
        (cli, "load_data", few_images),
        (metrics, "load_data", few_images),
        (metrics, "load_classifier", lambda device="cpu", dataset="": copy.deepcopy(classifier).to(device)),
    ):
        monkeypatch.setattr(owner, name, value)
    with FakeCuda(allow_non_fake_inputs=True):
        try:
            torch.ones(2).to(GPU)[:1].sum().item()
        except (AssertionError, RuntimeError, TypeError) as error:
            pytest.skip(f"torch {torch.__version__} needs a GPU for this: {str(error).splitlines()[0]}")
        yield


@pytest.mark.filterwarnings("ignore")  # of figures and moments of equal numbers
@pytest.mark.parametrize("name", ["gan", "conditional", "vae", "classifier"])
def test_a_whole_run(name, fake_cuda, monkeypatch, tmp_path):
    """Train, draw every figure and compute every metric, with few steps and images."""
    for owner, attribute, value in (
        (AR, "draw_images", lambda network, shape, *_: network.first.weight.new_zeros(shape)),  # tested below
        (ar_sampler, "can_cache", lambda *_: True),
        (train_classifier, "Classifier", lambda: Classifier(channels=(2, 2))),
        (pixelcnn_results.Image, "open", lambda _: pixelcnn_results.GIF_PALETTE),
        (Figure, "savefig", lambda *_, **__: None),
        (run, "DRY_RUN_BATCHES", 1),
        (cli, "DRY_RUN_EPOCHS", 1),
        (metrics, "NUM_JUDGED_QUICKLY", 20),
        (step2, "load_unconditional", lambda run: None),  # torch.load gives fake tensors here
        (pixelcnn_results, "PIXELS_A_FRAME", 392),
    ):
        monkeypatch.setattr(owner, attribute, value)
    step, more = children.STEPS.get(name, train_classifier), children.FLAGS.get(name, [])
    more = [*more, "--loss", "relativistic", "--penalty-every", "1"] if name == "gan" else more
    assert step.main(["--dry-run", "--device", "cuda", "--out-dir", str(tmp_path), *more]) == 0


@pytest.mark.parametrize("block", get_args(AR.Block))
def test_samples_of_pixelcnns(block, fake_cuda, monkeypatch):
    monkeypatch.setattr(AR, "IMAGE_SHAPE", (1, 2, 3))
    architecture = dict(children.SMALL, block=block, positional=block == "residual")
    network, given = AR.PixelCNN(**architecture).to(GPU), torch.zeros(2, 1, 1, 3)
    assert network.sample(2).is_cuda and network.sample(2, torch.Generator(), False, given).is_cuda
    with GPU:
        network = AR.ConditionalPixelCNN(**architecture)
    assert network.sample([3, 4]).is_cuda and network.sample(torch.tensor([3, 4]), cached=False).is_cuda


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + torch.ones(2),
        lambda x: torch.ones(2)[x.long()],
        lambda x: x.double(),
        lambda x: x.numpy(),
    ],
)
def test_faults_are_seen(use, fake_cuda):
    with pytest.raises((AssertionError, RuntimeError), match="device|GPU|numpy"):
        use(torch.ones(2).to(GPU))
