"""Packed documents: what a model makes of each is what it makes of it alone; and the tokens on the disk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB, gradients, make_model, move_graphs
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from symphony_hf import expert_graphs, symphonize, update_graphs
from symphony_hf.data.blocks import NO_LABEL, pack_blocks
from symphony_hf.data.documents import Document
from symphony_hf.data.packing import TokenBlocks, check_packed_batches, check_packing, make_block
from symphony_hf.data.token_store import TokenStore, _table
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.experiments.conformance.tiny import tiny_model

LENGTHS = (5, 1, 7, 3)  # one document is a single token
FAMILIES = ["mixtral", "olmoe", "qwen2_moe"]


def packed_batch():
    """Return two blocks of documents of all lengths, and the documents. The second block begins inside one."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]
    block = torch.cat(documents).numpy()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1].numpy()
    late = make_block(block.copy(), starts[1:])
    rows = [make_block(block, starts), late]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, documents


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_has_the_logits_that_it_has_alone(family, attention):
    model = make_model(family)
    model.set_attn_implementation(attention)
    move_graphs(symphonize(model))
    batch, documents = packed_batch()
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        alone = [model(input_ids=document.unsqueeze(0)).logits[0] for document in documents]
        unpacked = model(input_ids=batch["input_ids"][:1]).logits[0]
    # float32 attention over other numbers of masked tokens: sums in another order.
    for row in packed:
        torch.testing.assert_close(row, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed[0], unpacked, atol=1e-2)  # where all attend to all, they influence each other


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_counts_of_packed_documents_are_those_of_the_documents(family):
    """Without an attention mask every token counts, each once."""
    batch, documents = packed_batch()
    batch = {name: tensor[:1] for name, tensor in batch.items()}
    weights = {"balance_loss_weight": 0, "z_loss_weight": 0}
    packed, alone = (symphonize(make_model(family), decay=0.9, **weights).train() for _ in range(2))
    loss = packed(**batch, use_cache=False).loss
    loss.backward()
    expected = 0
    for document in documents:  # the single token predicts nothing, but is routed and counted
        ids = document.unsqueeze(0)
        logits = alone(input_ids=ids).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
    expected = expected / sum(length - 1 for length in LENGTHS)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(alone).items():
        # float32 sums over the tokens in another order, through three layers.
        torch.testing.assert_close(gradients(packed)[name], gradient, rtol=1e-3, atol=1e-5)
    update_graphs(packed)
    update_graphs(alone)
    for name, graph in expert_graphs(packed).items():
        # One average of the same integer counts: one float32 ulp.
        torch.testing.assert_close(graph, expert_graphs(alone)[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(graph, torch.eye(len(graph)) * graph.diagonal())


def test_the_first_token_of_a_document_is_no_label_and_positions_begin_anew():
    block = make_block(torch.arange(10, 18).numpy(), torch.tensor([2, 3, 6]).numpy())
    assert block["input_ids"].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert block["labels"].tolist() == [10, 11, NO_LABEL, NO_LABEL, 14, 15, NO_LABEL, 17]
    assert block["position_ids"].tolist() == [0, 1, 0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_documents_apart_may_pack(family, dtype):
    model = tiny_model(family).to(dtype).train()
    check_packing(model)
    assert model.training


def test_attention_that_needs_an_accelerator_is_kept_and_not_run_on_the_cpu(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel on the CPU")

    monkeypatch.setitem(AttentionInterface._global_mapping, "kernel", fail)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "kernel", sdpa_mask)
    model = tiny_model("olmoe")
    model.set_attn_implementation("kernel")
    check_packing(model, "kernel")
    with pytest.raises(RuntimeError, match="no kernel"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_attention_that_keeps_documents_apart_in_one_row_alone_is_refused(monkeypatch):
    """As flash attention does, which is causal attention over whole rows where there are several."""

    def forward(module, query, key, value, mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, mask if len(query) == 1 else None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "one_row", forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "one_row", sdpa_mask)
    model = tiny_model("olmoe")
    model.set_attn_implementation("one_row")
    check_packing(model, rows=1)
    with pytest.raises(DataError, match="influence each other"):
        check_packing(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_flash_attention_needs_batches_of_one_packed_row(attention):
    check_packed_batches(attention, train=1, evaluation=1)
    check_packed_batches("sdpa", train=4)
    check_packed_batches(None, train=4)
    with pytest.raises(ConfigError, match=r"only in batches of one row, got `evaluation: 8`: set 1"):
        check_packed_batches(attention, train=1, evaluation=8)


def test_a_model_whose_logits_show_nothing_is_refused():
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # 0 / 0
    with pytest.raises(DataError, match="no finite logits"):
        check_packing(model)


@pytest.mark.parametrize(
    ("family", "why"), [("gpt_oss", "influence each other"), ("qwen3_next", "influence each other")]
)
def test_models_that_do_not_are_refused(family, why):
    with pytest.raises(DataError, match=f"packing: .*{why}.*set `packing: false`"):
        check_packing(tiny_model(family))


def test_models_without_positions_are_refused():
    with pytest.raises(DataError, match=r"SwitchTransformers.* takes no `position_ids`"):
        check_packing(tiny_model("switch_transformers"))


# Blocks of tokens that are on the disk

some_texts = st.lists(st.text(max_size=40), min_size=1, max_size=8)


@pytest.mark.thorough
@given(texts=some_texts, block_size=st.integers(2, 9))
def test_blocks_from_the_disk_are_those_from_memory(trained_tokenizer, texts, block_size):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    try:
        expected = pack_blocks(documents, trained_tokenizer, block_size)
    except DataError:
        with pytest.raises(DataError, match=r"less than one block .* smaller block_size"):
            TokenBlocks(TokenStore(texts, trained_tokenizer), block_size)
        return
    blocks = TokenBlocks(TokenStore(texts, trained_tokenizer), block_size)
    assert [blocks[index]["input_ids"].tolist() for index in range(len(blocks))] == expected.tolist()
    assert blocks[0].keys() == {"input_ids", "labels"}
    assert torch.equal(blocks[0]["labels"], blocks[0]["input_ids"])


@pytest.mark.thorough
@given(texts=some_texts, block_size=st.integers(2, 9))
def test_packed_blocks_restart_where_the_documents_do(trained_tokenizer, texts, block_size):
    naive = []  # (token, is the first of its document), one document at a time
    for text in texts:
        tokens = trained_tokenizer.tokenize(text)
        ids = [*trained_tokenizer.convert_tokens_to_ids(tokens), trained_tokenizer.eos_token_id]
        naive += [(token, place == 0) for place, token in enumerate(ids)]
    if len(naive) < block_size:
        return
    blocks = TokenBlocks(TokenStore(texts, trained_tokenizer), block_size, packing=True)
    for index in range(len(blocks)):
        position, expected = -1, []
        for token, is_first in naive[index * block_size : (index + 1) * block_size]:
            position = 0 if is_first else position + 1
            expected.append((token, NO_LABEL if is_first else token, position))
        columns = (blocks[index][name].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert list(zip(*columns, strict=True)) == expected


def test_tokens_that_were_written_in_many_pieces_are_one_sequence(tokenizer):
    texts = [f"document {number}" for number in range(2_500)]  # `datasets` writes a thousand rows at a time
    store = TokenStore(texts, tokenizer)
    assert len(store._pieces) > 1
    flat = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert len(store) == len(flat)
    for start in (0, 3, *(int(edge) - 2 for edge in store._piece_starts[1:-1])):
        assert store.slice(start, start + 5).tolist() == flat[start : start + 5]
    assert store.slice(0, len(flat)).tolist() == flat


def test_texts_are_tokenized_once(tokenizer, monkeypatch):
    texts = [f"text number {number}" for number in range(20)]
    first = TokenStore(texts, tokenizer)

    def fail(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("symphony_hf.data.token_store.closed_ids", fail)
    again = TokenStore(list(texts), tokenizer)
    assert again.slice(0, len(again)).tolist() == first.slice(0, len(first)).tolist()
    for other in (texts[::-1], ["ab", "c"], ["a", "bc"]):
        with pytest.raises(AssertionError, match="tokenized again"):
            TokenStore(other, tokenizer)


def test_another_tokenizer_tokenizes_again(tokenizer, small):
    texts = [document.text for document in small.test]
    other = train_tokenizer(small.train, 300)
    assert len(TokenStore(texts, other)) > len(TokenStore(texts, tokenizer))


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        TokenStore(["some text"], bare)


def test_there_is_no_block_outside(tokenizer):
    blocks = TokenBlocks(TokenStore(["some text, and more of it"], tokenizer), 4)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[index]


def test_texts_of_more_than_two_gigabytes_have_offsets_for_them():
    """Arrow's `string` has offsets of 32 bits. So much text is not for a test."""
    assert str(_table(["a", "b"]).data.schema.field("text").type) == "large_string"
