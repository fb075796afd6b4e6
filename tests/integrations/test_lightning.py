"""The callback of Lightning: the records of a monitor, in the log and in checkpoints, without an effect on training."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import SAM, BiSAM, SharpnessAware, cross_entropy
from bisam.analysis import Monitor, sharpness
from tests.support.cases import buffers, parameters

pytest.importorskip("lightning_fabric")
try:
    from bisam.integrations.lightning import AnalysisCallback
except ImportError:
    pytest.skip("needs Lightning", allow_module_level=True)

pytestmark = [  # warnings that every user of this torch, or of a loader without workers, gets
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
each_package = pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])


def loader(seed: int = 1, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """Six batches. A loader that shuffles draws from the generator that dropout draws from, another one does not."""
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))
    own = None if shuffle else torch.Generator()
    return DataLoader(TensorDataset(x, torch.arange(24) % 4), batch_size=4, shuffle=shuffle, generator=own)


def fitted(
    callback: Any = None,
    *,
    package: str = "lightning.pytorch",
    epochs: int = 2,
    save: Any = None,
    resume: Any = None,
    sharps: int = 1,
    shuffle: bool = True,
) -> tuple[Any, Any, list[tuple[int, dict[str, float]]]]:
    """The module and the trainer after training with accumulation of two batches, and the lines of the logger."""
    pl = pytest.importorskip(package)
    lines: list[tuple[int, dict[str, float]]] = []

    class Logger(importlib.import_module(f"{package}.loggers").Logger):
        name, version = "lines", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            lines.append((step or 0, metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))
            self.sharp = SharpnessAware(model, BiSAM(0.1), cross_entropy)
            self.others = nn.ModuleList([SharpnessAware(model, SAM(), cross_entropy) for _ in range(sharps - 1)])

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.sharp(*batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.sharp.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        callbacks=None if callback is None else [callback],
        logger=Logger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    trainer.fit(module, loader(shuffle=shuffle), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return module, trainer, lines


def state(module: Any) -> tuple[Any, ...]:
    return parameters(module.sharp.model), buffers(module.sharp.model), torch.get_rng_state().tolist()


@each_package
def test_the_records_of_optimizer_steps_are_logged_and_training_does_not_change(package):
    callback = AnalysisCallback(loader(2), 0.5, every=2)
    module, trainer, lines = fitted(callback, package=package)
    after = state(module)
    history = callback.monitor.history
    assert [record["step"] for record in history] == [2, 4, 6]  # of optimizer steps: there are 12 batches
    assert lines == [
        (record["step"], {f"analysis/{k}": v for k, v in record.items() if k != "step"}) for record in history
    ]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics == pytest.approx(lines[-1][1], rel=1e-6)
    assert history[-1] == Monitor(module.sharp, callback.monitor.batches, 0.5).record() | {"step": 6}
    assert after == state(fitted(package=package)[0])


def test_a_resumed_training_goes_on_with_the_same_records(tmp_path):
    make = partial(AnalysisCallback, loader(2, shuffle=False), 0.5, every=2)
    whole, first, second = make(), make(), make()
    expected, _, _ = fitted(whole, epochs=3, shuffle=False)
    fitted(first, epochs=1, shuffle=False, save=tmp_path / "saved")
    module, _, lines = fitted(second, epochs=3, shuffle=False, resume=tmp_path / "saved")
    assert parameters(module.sharp.model) == parameters(expected.sharp.model)
    assert [record["step"] for record in first.monitor.history] == [2]
    assert [record["step"] for record in whole.monitor.history] == [2, 4, 6, 8]
    assert [step for step, _ in lines] == [4, 6, 8]
    for found, wanted in zip(second.monitor.history, whole.monitor.history, strict=True):
        assert found == wanted


def test_two_callbacks_need_different_prefixes_and_the_loss_can_be_named():
    one = AnalysisCallback(loader(2), every=3, sharp=lambda module: module.sharp, measures={"a": sharpness})
    assert one.state_key != AnalysisCallback(loader(2), prefix="b/").state_key
    module, _, lines = fitted(one, sharps=2)
    assert one.monitor.sharp is module.sharp
    assert [list(values) for _, values in lines] == [["analysis/a", "analysis/a_loss"]] * 2
    with pytest.raises(ValueError, match="looks for the SharpnessAware of Module, which has 2: name it"):
        fitted(AnalysisCallback(loader(2)), sharps=2)
    given = AnalysisCallback(loader(2), every=3, sharp=module.sharp)
    fitted(given)
    assert given.monitor.sharp is module.sharp


def test_bad_arguments_are_refused_when_training_starts():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        fitted(AnalysisCallback(loader(2), every=0))
