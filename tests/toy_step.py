"""Step 4: a mixture of Bernoulli distributions on binarised MNIST."""

import sys
from typing import Annotated

import torch

from models.mixture import BernoulliMixture
from utils import cli, data, files, metrics, plotting

STEP = "step4_mixture"
VARIANTS = {"few": ("how many components are needed?", dict(components=10))}


def train(
    run,
    images,
    *,
    num_epochs: Annotated[int, "passes over the training images"] = 10,
    batch_size: Annotated[int, "images in a batch"] = 128,
    learning_rate: Annotated[float, "learning rate of Adam"] = 3e-2,
    components: Annotated[int, "components of the mixture"] = 50,
):
    model = BernoulliMixture(components).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    run.resume_or_start(model=model, optimizer=optimizer)
    for _ in run.epochs(num_epochs):
        for (x,) in run.batches(images, batch_size=batch_size):
            nll = -model(data.binarize(x, "threshold")).mean()
            optimizer.zero_grad()
            nll.backward()
            optimizer.step()
            run.record_row(nll=nll)
        run.print_epoch(run.pop_means())
    return model


def train_and_evaluate(run, train_set, test_set):
    model = train(run, train_set[0], **run.options)
    run.save_model(model, components=run.options["components"])
    panels = [("NLL (nats per image)", {"training": run.tables["losses"]["nll"]}, {})]
    run.draw("loss.png", plotting.save_curves, run.tables["losses"]["iteration"], panels, "iteration")
    sample(run, run.folder / "model.pt", test_set)
    test_nll = -model(data.binarize(test_set[0], "threshold")).mean().item()
    _, quality = metrics.judge_sampler(run, model.sample, "threshold")
    run.finish(test_nll=files.metric(test_nll, "nats per image", "-log p(x), mean over images"), **quality)


def sample(run, path, test_set):
    model = files.load_network(path, (STEP,), BernoulliMixture, run.device)
    images = model.sample(run.args.count or 100, torch.Generator().manual_seed(run.args.seed))
    run.draw("samples.png", plotting.save_images, images, 10)


def main(argv=None):
    return cli.main(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
