"""Lightning's Trainer moves the graphs as the plain loop does, with gradient accumulation too."""

import pytest
import torch
from models import make_ids, make_model

from symphony_hf import PatchError, expert_graphs, symphonize, update_graphs

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.clients

NUM_BATCHES = 6


def batches():
    return [make_ids(seed=seed) for seed in range(NUM_BATCHES)]


def module_of(model):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches(), batch_size=None)

    return Module()


def fit(model, callbacks, accumulated, tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulated, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module_of(model.train()))
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's, about itself
@pytest.mark.parametrize("accumulated", [1, 3])
def test_graphs_are_those_of_the_plain_loop(accumulated, tmp_path):
    from symphony_hf.training.lightning import SymphonyLightningCallback

    model, plain = (symphonize(make_model(), decay=0.5).train() for _ in range(2))
    trainer = fit(model, [SymphonyLightningCallback()], accumulated, tmp_path)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number, ids in enumerate(batches(), start=1):
        (plain(ids, labels=ids).loss / accumulated).backward()
        if number % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
            assert update_graphs(plain)
    assert all(torch.equal(graph, expert_graphs(plain)[name]) for name, graph in expert_graphs(model).items())
    assert trainer.callback_metrics["symphony/balance_loss"] > 0
    with pytest.raises(PatchError, match="not symphonized"):
        fit(make_model(), [SymphonyLightningCallback()], 1, tmp_path)
