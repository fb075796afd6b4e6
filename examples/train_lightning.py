"""Lightning: automatic optimization, with the loss as an attribute of the module."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bisam import BiSAM, SharpnessAware


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
        # An attribute of the module, so that checkpoints contain the state of the method. They store the weights once,
        # under two names; a checkpoint made without the loss loads with strict=False.
        self.sharp = SharpnessAware(self.model, BiSAM(rho=0.05), loss=criterion)

    def training_step(self, batch, index):
        loss = self.sharp(*batch)
        self.log("clean_loss", self.sharp.clean.value, prog_bar=True)  # at the weights, without an extra pass
        return loss

    def test_step(self, batch, index):
        inputs, targets = batch
        self.log("accuracy", (self.model(inputs).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)]


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train = DataLoader(TensorDataset(x[:1300], y[:1300]), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(x[1300:], y[1300:]), batch_size=len(x))
trainer = lightning.Trainer(
    devices=1,
    max_epochs=6,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
digits = Digits()
trainer.fit(digits, train)
(metrics,) = trainer.test(digits, test, verbose=False)
print(f"test accuracy {metrics['accuracy']:.3f}")
