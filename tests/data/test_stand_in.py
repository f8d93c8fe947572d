"""Batches of text alone, in training with images: every parameter runs, and nothing of the text changes."""

import pytest
import torch
import torch.multiprocessing as mp
from models import gradients
from safetensors.torch import load_file, save_file
from stand_in_ranks import STRATEGIES, prepare_model, run_rank
from transformers import LlavaForConditionalGeneration
from visual import TOKENS_PER_IMAGE, entry, make_model, make_processor, write_llava

from symphony_hf import expert_graphs, symphonize, update_graphs
from symphony_hf.data.blocks import NO_LABEL, pad_rows
from symphony_hf.data.prepare import prepare_data
from symphony_hf.recipe import DataSection

TEXT_ROWS = (1, 3, 5)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    entries = [entry(number, images=int(number not in TEXT_ROWS), turns=number % 3 + 1) for number in range(6)]
    section = DataSection(kind="llava", path=str(write_llava(tmp_path, entries)))
    return prepare_data(section, make_processor(tokenizer), seed=0)


def text_batch(prepared):
    """Return rows of text as the collator makes them, and the same padded without an image."""
    rows = [prepared.train[number] for number in TEXT_ROWS]
    bare = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    return prepared.collator(rows), pad_rows(bare, prepared.collator.pad_id)


def run(model, batch):
    output = model.train()(**batch)
    output.loss.backward()
    return output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_stand_in_changes_no_logit_loss_gradient_or_count_of_the_text(prepared, family, attention):
    batch, bare = text_batch(prepared)
    with_image, without = (
        symphonize(make_model(prepared.collator.processor, family), decay=0.9, balance_loss_weight=0.5)
        for _ in range(2)
    )
    for model in (with_image, without):
        model.set_attn_implementation(attention)
    ours, expected = run(with_image, batch), run(without, bare)
    kept = bare["attention_mask"].bool()
    logits = ours.logits[:, : bare["input_ids"].shape[1]]
    # float32 sums over longer rows, in another order.
    torch.testing.assert_close(logits[kept], expected.logits[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)
    of_image = ("vision_tower", "multi_modal_projector")
    for name, gradient in gradients(without).items():
        torch.testing.assert_close(gradients(with_image)[name], gradient, rtol=1e-3, atol=1e-5)
    for name, parameter in with_image.named_parameters():
        if any(part in name for part in of_image):
            assert without.get_parameter(name).grad is None  # what makes the other processes wait
            # The last vision layer's output is not used, as LLaVA takes the one before.
            unused = ".layers.1." in name or "post_layernorm" in name
            assert unused or not parameter.grad.any()
    update_graphs(with_image)
    update_graphs(without)
    for name, graph in expert_graphs(with_image).items():
        assert torch.equal(graph, expert_graphs(without)[name])  # integer counts, not one more


def test_a_stand_in_is_an_image_of_another_row_masked_and_no_label(prepared):
    batch, bare = text_batch(prepared)
    length = bare["input_ids"].shape[1]
    image_id = prepared.collator.image_id
    shortest = int(bare["attention_mask"].sum(1).argmin())
    is_image = batch["input_ids"] == image_id
    assert is_image.sum(1).tolist() == [TOKENS_PER_IMAGE if row == shortest else 0 for row in range(3)]
    assert not batch["attention_mask"][is_image].any()
    assert (batch["labels"][is_image] == NO_LABEL).all()
    assert batch["input_ids"].shape[1] == length  # the shortest row has room for it
    real = prepared.collator.pixels([prepared.train[0].images[0], prepared.train[2].images[0]])
    assert any(torch.equal(batch["pixel_values"][0], image) for image in real)
    stand_ins = {prepared.train[number].stand_in["path"] for number in TEXT_ROWS}
    assert len(stand_ins) > 1  # not the same one for all
    assert all(prepared.train[number].stand_in is None for number in (0, 2, 4))


def test_positions_do_not_go_on_over_a_stand_in(prepared):
    """Some position encodings (`longrope`, `dynamic`) change for all tokens with the highest position."""
    row = prepared.train[1]
    batch = prepared.collator([row])
    length = len(row.input_ids)
    assert batch["position_ids"][0].tolist() == [*range(length), *[0] * TOKENS_PER_IMAGE]


def test_a_batch_with_an_image_has_no_stand_in(prepared):
    batch = prepared.collator([prepared.train[0], prepared.train[1]])
    assert "position_ids" not in batch
    assert batch["pixel_values"].shape[0] == 1
    assert (batch["input_ids"] == prepared.collator.image_id).sum() == TOKENS_PER_IMAGE


def test_a_model_takes_every_batch_of_an_epoch(prepared):
    model = make_model(prepared.collator.processor)
    assert isinstance(model, LlavaForConditionalGeneration)
    for start in range(6):
        rows = [prepared.train[(start + step) % 6] for step in range(2)]
        assert model(**prepared.collator(rows)).loss.isfinite()


@pytest.mark.slow
def test_one_rank_may_have_text_alone(prepared, tmp_path):
    processor = prepared.collator.processor
    batches = [prepared.collator([prepared.train[number] for number in rows]) for rows in ((1, 3), (0, 2))]
    assert [batch["input_ids"].eq(prepared.collator.image_id).sum() for batch in batches] == [4, 8]
    for rank, batch in enumerate(batches):
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, tmp_path / f"batch{rank}.st")
    mp.spawn(run_rank, (tmp_path, processor), nprocs=2)
    model = prepare_model(processor)
    for batch in batches:
        (model(**batch).loss / 2).backward()
    update_graphs(model)
    for strategy in STRATEGIES:
        for rank in range(2):
            found = load_file(tmp_path / f"{strategy}.{rank}.st")
            for name, graph in expert_graphs(model).items():
                assert torch.equal(found[name], graph)
            for name, gradient in gradients(model).items():
                # The mean of two, summed in another order.
                torch.testing.assert_close(found[f"grad.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)
