"""What changing one layer costs, against the divergence written out."""

from pathlib import Path

import pytest
import torch

import lmpress
from lmpress.calibrate.model.architecture import weight_of
from lmpress.calibrate.statistics.sensitivity import Sensitivity

LAYER = "model.layers.1.mlp.down_proj"


def test_the_loss_is_the_divergence_and_the_model_stays_as_it_was(tiny: Path) -> None:
    model, other = lmpress.load(tiny), lmpress.load(tiny)
    ids = torch.randint(2, 10, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    weight = weight_of(model.get_submodule(LAYER)).detach()
    changed = 0.5 * weight
    before = weight.clone()
    found = Sensitivity(model, ids, mask)
    loss = found.loss(LAYER, changed)
    assert torch.equal(weight_of(model.get_submodule(LAYER)), before)
    assert found.loss(LAYER, before) == 0.0
    with torch.no_grad():
        weight_of(other.get_submodule(LAYER)).copy_(changed)
        p, q = (m(ids, attention_mask=mask).logits.double().softmax(-1) for m in (model, other))
    expected = (p * (p / q).log()).sum(-1)[mask.bool()].mean()
    assert loss == pytest.approx(float(expected), rel=1e-3)
    assert loss > 0


def test_energies_are_sums_of_squares(tiny: Path) -> None:
    model = lmpress.load(tiny)
    ids = torch.randint(2, 10, (2, 9), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    found = Sensitivity(model, ids).energies({LAYER: None})
    assert torch.allclose(found[LAYER], seen[0].flatten(0, 1).square().sum(0), rtol=1e-4)
