"""The page on analysis: its code runs, and its table of costs is that of the results."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bisam import L2, SAM, SharpnessAware, analysis, cross_entropy
from tests.support import cases

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def code(integrations: bool) -> list[str]:
    """The blocks of the page, those with integrations or the others."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for block in blocks if ("bisam.integrations" in block) == integrations]


def test_the_code_of_the_page_runs():
    for package in ("curvlinops", "torchmetrics", "torchvision"):
        pytest.importorskip(package)
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {}
    blocks = code(integrations=False)
    for block in blocks:
        exec(block, names)
    assert [one.get_ylabel() for one in names["panels"]][:2] == ["sharpness", "sharpness loss"]
    assert [record["step"] for record in names["monitor"].history] == [2, 4]
    assert names["one"].rise <= names["many"].rise
    assert names["axes"].get_xlabel() == "along a random direction"
    plotted = ("one", "worst", "flipped", "top", "density", "line", "plane", "path")
    plotted += ("found", "scaled", "calibrated", "rank", "slope", "errors")
    results = [names[name] for name in plotted]
    for result in results:
        assert result.plot().get_xlabel()
        assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result
        plt.close("all")
    sharp, loader = names["sharp"], names["loader"]
    assert names["many"].forward == pytest.approx(21 * 3 + 1)
    assert names["many"].backward == pytest.approx(20 * 3)
    assert (names["mean"].forward, names["mean"].backward) == (pytest.approx(21), 0)
    objectives = sum(len(series) for series in names["worst"].adversaries.values())
    assert names["worst"].forward == pytest.approx(3 * 30 + objectives + 1)
    assert names["worst"].backward == pytest.approx(3 * 30)
    assert (names["flipped"].forward, names["flipped"].backward) == (pytest.approx(9), pytest.approx(4))
    assert all(names[name].forward == pytest.approx(1) for name in ("found", "scaled", "calibrated", "rank", "slope"))
    assert names["slope"].backward == pytest.approx(1)
    assert names["errors"].forward == pytest.approx(7 * 5 + 1)
    seen: list[tuple[int, int]] = []
    analysis.landscape(sharp, loader, "random", points=5, progress=lambda *now: seen.append(now))
    assert seen[-1] == (6 * 256, 6 * 256)
    assert analysis.sharpness(sharp, loader, L2(0.0)).rise == 0
    cost = names["monitor"].cost
    assert (cost.forward, cost.backward, cost.examples, cost.every) == (8, 3, 256, 2)
    shares = [analysis.Cost(cost.forward, cost.backward, 1000, every).share(64) for every in (100, 1000)]
    assert [f"{100 * share:.2g}" for share in shares] == ["36", "3.6"]


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_the_block_of_lightning_runs():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sharp = SharpnessAware(torch.nn.Linear(6, 4), SAM(), cross_entropy)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.sharp(*batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = (torch.cat(parts) for parts in zip(*[cases.batch(i, 16) for i in range(4)], strict=True))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    host = SimpleNamespace(Trainer=partial(lightning.Trainer, accelerator="cpu", enable_model_summary=False, **quiet))
    data = torch.utils.data.TensorDataset(x.float(), y)
    names = {"lightning": host, "module": Module(), "loader": torch.utils.data.DataLoader(data, batch_size=16)}
    (block,) = [block for block in code(integrations=True) if "lightning" in block]
    exec(block, names)
    assert [record["step"] for record in names["callback"].monitor.history] == [2, 4]


def test_the_block_of_the_trainer_runs(tmp_path):
    transformers = pytest.importorskip("transformers")
    from bisam.integrations.transformers import SharpnessAwareTrainer

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    config.bos_token_id = config.eos_token_id = 1
    rows = [{"input_ids": torch.randint(20, (6,))} for _ in range(16)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = SharpnessAwareTrainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(str(tmp_path), **arguments),
        method=SAM(),
        train_dataset=rows,
        eval_dataset=rows,
    )
    (block,) = [block for block in code(integrations=True) if "transformers" in block]
    names: dict[str, Any] = {"trainer": trainer}
    exec(block, names)
    assert [record["step"] for record in names["callback"].monitor.history] == [2]
    assert any("analysis/flips/BiSAM" in line for line in trainer.state.log_history)


def test_the_page_has_each_function():
    functions = {name for name in vars(analysis) if name[0].islower() and callable(getattr(analysis, name))}
    named = set(re.findall(r"`?\b([a-z_]+)\(", PAGE.read_text()))
    assert {"sharpness", "flips", "trace"} <= functions
    assert functions <= named
