"""Lightning's Trainer moves the graphs as the plain loop does, with gradient accumulation too."""

import importlib

import pytest
import torch
from loop_ranks import STEPS, Record, assert_same, codes_of, make, micro_batch, plain_loop, sgd, steps_of
from models import make_model

from symphony_hf import PatchError, symphonize
from symphony_hf.patching.attachment import tracker_of

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.clients


def module_of(model, num_batches):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return sgd(self.model)

        def train_dataloader(self):
            batches = [micro_batch(number) for number in range(num_batches)]
            return torch.utils.data.DataLoader(batches, batch_size=None)

    return Module()


def fit(model, callbacks, tmp_path, accumulated=1, max_epochs=1, resume=None, log_every=1):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=max_epochs, accumulate_grad_batches=accumulated, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=log_every, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module_of(model.train(), STEPS * accumulated), ckpt_path=resume)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's, about itself
@pytest.mark.parametrize("accumulated", [1, 3])
def test_graphs_and_gradients_are_those_of_the_plain_loop(accumulated, tmp_path):
    """With the callback that the README gives it."""
    code, module = codes_of("Lightning")
    callback_class = importlib.import_module(module).SymphonyLightningCallback

    class Recording(callback_class):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            record.gradients()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.global_step > record.step:
                record.graphs()

    record = Record(make())
    given = eval(f"dict({code})", {callback_class.__name__: Recording})
    trainer = fit(record.model, given["callbacks"], tmp_path, accumulated)
    assert_same(record.tensors, plain_loop(make(), steps_of(accumulated)))
    assert trainer.callback_metrics["symphony/balance_loss"] > 0
    with pytest.raises(PatchError, match="not symphonized"):
        fit(make_model(), [callback_class()], tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_not_logged_is_not_of_the_next_training(tmp_path):
    """0 steps between two logs are none at all."""
    from symphony_hf.training.lightning import SymphonyLightningCallback

    model = make()
    fit(model, [SymphonyLightningCallback()], tmp_path, log_every=0)
    num_forwards = lambda: tracker_of(model).state.logged_losses[0, 2]  # noqa: E731
    assert num_forwards() == STEPS
    fit(model, [SymphonyLightningCallback()], tmp_path, log_every=0)
    assert num_forwards() == STEPS


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_resumed_run_is_balanced_by_the_step_before_it(tmp_path):
    from symphony_hf.training.lightning import SymphonyLightningCallback

    model, resumed = (symphonize(make_model(), balance_scope="last_step") for _ in range(2))
    trainer = fit(model, [SymphonyLightningCallback()], tmp_path)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    seen = []
    resumed.register_forward_hook(lambda *_: seen.append(loads_of(resumed)))
    fit(resumed, [SymphonyLightningCallback()], tmp_path, max_epochs=2, resume=tmp_path / "saved.ckpt")
    assert len(seen) == STEPS
    assert torch.equal(seen[0], loads_of(model))
    assert not torch.equal(seen[0], torch.full_like(seen[0], float(seen[0].mean())))


def loads_of(model):
    return next(iter(tracker_of(model).state.last_loads.values())).clone()
