"""Convolutions: unfolding against the convolution itself, patterns along input channels, a trained ResNet-20."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lmpress
from lmpress.compress.methods.prune.classifier import as_matrix, as_weight, patches, retune_batch_norms
from lmpress.errors import UsageError


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}, {"kernel_size": (1, 3)}], ids=str
)
def test_a_convolution_is_a_linear_layer_on_patches(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, **{"kernel_size": 3, "bias": False, **options})
    x = torch.randn(2, 5, 9, 8)
    matrix = as_matrix(layer.weight)
    product = (patches(layer, x) @ matrix.T).view(2, -1, 4).transpose(1, 2)
    assert torch.allclose(product, layer(x).flatten(2), atol=1e-5)
    assert torch.equal(as_weight(matrix, layer.weight.shape), layer.weight)


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(),
        nn.Linear(8 * 9, 5),
    ).eval()  # fmt: skip


def test_patterns_run_along_input_channels() -> None:
    model, batches = small(), [torch.randn(16, 3, 8, 8)]
    masks = lmpress.prune_classifier(model, batches, pattern="2:4", keep=["0"])
    assert masks.keys() == {"3", "5"}
    weight = model[3].weight.detach()
    assert ((weight == 0).unflatten(1, (2, 4)).sum(2) == 2).all()
    assert torch.equal(masks["3"], weight == 0)
    assert not (model[0].weight == 0).any()


def test_exactobs_beats_the_others_on_the_network_output() -> None:
    batches = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
    reference = [small()(batch) for batch in batches]
    errors = []
    for method in ("exactobs", "sparsegpt", "magnitude"):
        model = small()
        lmpress.prune_classifier(model, batches, method=method, sparsity=0.6, retune=False)
        errors.append(
            sum(float((model(b) - r).square().sum().detach()) for b, r in zip(batches, reference, strict=True))
        )
    assert errors == sorted(errors)


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UsageError, match="grouped"):
        lmpress.prune_classifier(model, [torch.randn(1, 4, 5, 5)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq"}, "gptq does not prune"),
        ({"options": {"drift": 1.0}}, "drift"),
        ({"options": {"dampling": 1.0}}, "dampling"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "its own sparsity"),
    ],
    ids=["a quantizer", "an option that needs pruned layers", "an unknown option", "sparsity and pattern"],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    model = small()
    with pytest.raises(UsageError, match=message):
        lmpress.prune_classifier(model, [torch.randn(2, 3, 8, 8)], **arguments)
    assert all((parameter != 0).all() for parameter in model.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("method", ["exactobs", "obs", "obd", "sparsegpt", "wanda", "magnitude"])
def test_every_pruning_method_takes_its_options(method: str) -> None:
    model, batches = small(), [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    scope = {} if method == "sparsegpt" else {"scope": "row"}
    options = {"damping": 0.1} if method in ("exactobs", "obs", "sparsegpt") else {"refit": True, "damping": 0.1}
    masks = lmpress.prune_classifier(model, batches, method=method, sparsity=0.25, options=scope | options)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert mask.any() and not weight[mask].any()
        if scope:
            assert (mask.flatten(1).sum(1) == int(mask[0].numel() * 0.25)).all()


@pytest.mark.parametrize("through_pruning", [False, True])
def test_batch_norms_follow_the_data(through_pruning: bool) -> None:
    model, batches = small(), [torch.randn(50, 3, 8, 8) + 2 for _ in range(3)]
    if through_pruning:
        lmpress.prune_classifier(model, batches, keep=["5"])
    else:
        retune_batch_norms(model, batches)
    before = torch.cat([model[0](b) for b in batches]).transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean, before.mean(1), atol=1e-4)
    assert not model.training and model[1].momentum == 0.1


class Shortcut(nn.Module):
    """The basic block of the CIFAR ResNets, with parameterless (option A) shortcuts."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + short)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Shortcut(a, b, s), Shortcut(b, b, 1), Shortcut(b, b, 1)) for a, b, s in stages
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet(assets: Path) -> tuple[ResNet20, Tensor, Tensor]:
    """The trained net, normalised images and labels."""
    model = ResNet20()
    model.load_state_dict(load_file(assets / "models/resnet20-cifar10/model.safetensors"))
    data = numpy.load(assets / "data/cifar10/test_100_per_class.npz")
    images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return model.eval(), (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(data["y"])


@torch.no_grad()
def test_a_trained_resnet_keeps_its_answers(assets: Path) -> None:
    """Calibrated on some images, compared with the dense net on others: 2:4 by ExactOBS against magnitude."""
    agreements = []
    for method in ("exactobs", "magnitude"):
        model, images, _ = resnet(assets)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out, calibration = images[chosen[:300]], list(images[chosen[300:420]].split(60))
        answers = model(held_out).argmax(1)
        lmpress.prune_classifier(model, calibration, method=method, pattern="2:4", keep=["conv1", "linear"])
        agreements.append(float((model(held_out).argmax(1) == answers).double().mean()))
    assert agreements[0] > agreements[1] + 0.03
    assert agreements[0] > 0.65
