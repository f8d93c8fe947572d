"""Lightning's Trainer moves the graphs as the plain loop does, with gradient accumulation too."""

import pytest
import torch
from models import make_ids, make_model

from symphony_hf import PatchError, expert_graphs, symphonize, update_graphs
from symphony_hf.patching.attachment import tracker_of

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


def fit(model, callbacks, accumulated, tmp_path, max_epochs=1, resume=None):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=max_epochs, accumulate_grad_batches=accumulated, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module_of(model.train()), ckpt_path=resume)
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


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_resumed_run_is_balanced_by_the_step_before_it(tmp_path):
    from symphony_hf.training.lightning import SymphonyLightningCallback

    model, resumed = (symphonize(make_model(), balance_scope="last_step") for _ in range(2))
    trainer = fit(model, [SymphonyLightningCallback()], 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    seen = []
    resumed.register_forward_hook(lambda *_: seen.append(loads_of(resumed)))
    fit(resumed, [SymphonyLightningCallback()], 1, tmp_path, max_epochs=2, resume=tmp_path / "saved.ckpt")
    assert len(seen) == NUM_BATCHES
    assert torch.equal(seen[0], loads_of(model))
    assert not torch.equal(seen[0], torch.full_like(seen[0], float(seen[0].mean())))


def loads_of(model):
    return next(iter(tracker_of(model).state.last_loads.values())).clone()
