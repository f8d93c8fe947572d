"""Every layout of columns gives TRL's SFTTrainer the tokens and labels that it makes of the same rows by itself."""

import copy
import json

import datasets
import pytest
from models import make_model

from symphony_hf.data.prepare import prepare_data
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.recipe import DataSection

QUESTIONS = [f"What is {number} plus one, and why?" for number in range(6)]
ANSWERS = [f"It is {number + 1}." for number in range(6)]
MESSAGES = [
    [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    for q, a in zip(QUESTIONS, ANSWERS, strict=True)
]
TOOL_TEMPLATE = (
    "{{ (tools or []) | length }} tools, {{ mood or 'calm' }}{% for m in messages %}|{{ m.role }}:{{ m.content }}"
    "{{ m.thinking or '' }}{% for call in m.tool_calls or [] %}[{{ call.name }}]{% endfor %}{% endfor %}"
)


def with_tools(messages, number):
    call = {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [{"name": f"add{number}"}]}
    return [messages[0], call, {"role": "tool", "content": "1"}, messages[1]]


LAYOUTS = {
    "messages": [{"messages": messages} for messages in MESSAGES],
    "conversations": [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in messages]} for messages in MESSAGES
    ],
    "pairs of text": [{"prompt": q, "completion": f" {a}"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
    "pairs of messages": [{"prompt": messages[:1], "completion": messages[1:]} for messages in MESSAGES],
    "text": [{"text": f"{q} {a}"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
    "tools": [
        {
            "messages": with_tools(messages, number),
            "tools": [{"type": "function", "function": {"name": f"add{number}"}}] * (number % 3),
            "chat_template_kwargs": {"mood": "sad" if number % 2 else "glad"},
        }
        for number, messages in enumerate(MESSAGES)
    ],
}
LOSSES = [
    *((layout, {}) for layout in LAYOUTS),
    ("messages", {"assistant_only_loss": True}),
    ("pairs of text", {"completion_only_loss": False}),
    ("pairs of text", {"completion_only_loss": True}),
    ("pairs of messages", {"completion_only_loss": False}),
    ("pairs of messages", {"completion_only_loss": False, "assistant_only_loss": True}),
]


@pytest.fixture
def model(tokenizer):
    return make_model(vocab_size=len(tokenizer), max_position_embeddings=512)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(path, tokenizer, train=None, **settings):
    section = DataSection(kind="chat", path=path, **settings)
    return prepare_data(section, tokenizer, seed=0, train=train)


def in_splits(folder, rows, held_out=None):
    """Write the rows as the train split of a folder, and the same or other rows as its held-out splits."""
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", rows if split == "train" or held_out is None else held_out)
    return str(folder)


def make_trainer(rows, model, tokenizer, folder, **settings):
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **{"max_length": 256, **settings}
    )
    return SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def tokens_and_labels(trainer):
    return trainer.train_dataset["input_ids"][:], trainer.train_dataset["labels"][:]


@pytest.mark.thorough
@pytest.mark.parametrize(("layout", "train"), LOSSES, ids=str)
def test_tokens_and_labels_are_trls(tmp_path, tokenizer, model, layout, train):
    if layout == "tools":
        tokenizer.chat_template = TOOL_TEMPLATE
    prepared = prepare(in_splits(tmp_path / "rows", LAYOUTS[layout]), tokenizer, train)
    source = datasets.Dataset.from_list(LAYOUTS[layout])
    ours = make_trainer(prepared.train, model, tokenizer, tmp_path / "ours", **train)
    theirs = make_trainer(source, model, tokenizer, tmp_path / "theirs", **train)
    assert tokens_and_labels(ours) == tokens_and_labels(theirs)
    masks_something = any(label == -100 for row in ours.train_dataset["labels"][:] for label in row)
    wanted = train.get("completion_only_loss", "pairs" in layout) or train.get("assistant_only_loss", False)
    assert masks_something == wanted
    expected = {"completions": train.get("completion_only_loss", "pairs" in layout)}
    expected["assistant turns"] = train.get("assistant_only_loss", False)
    named = " and ".join(name for name, is_named in expected.items() if is_named)
    assert prepared.notes[-1].endswith(f"; loss on {named} only" if named else "; loss on all tokens")


@pytest.mark.parametrize("layout", ["pairs of text", "text"])
def test_text_needs_no_chat_template(tmp_path, tokenizer, layout):
    assert tokenizer.chat_template is None
    prepare(in_splits(tmp_path, LAYOUTS[layout]), tokenizer)
    assert tokenizer.chat_template is None


def test_text_may_have_another_column_name(tmp_path, tokenizer, model):
    rows = [{"body": row["text"], "title": "x"} for row in LAYOUTS["text"]]
    prepared = prepare(in_splits(tmp_path, rows), tokenizer, text_column="body")
    assert prepared.train[:] == {"text": [row["text"] for row in LAYOUTS["text"]]}


def test_packed_pairs_keep_their_masks_and_evaluate(tmp_path, tokenizer, model):
    prepared = prepare(in_splits(tmp_path, LAYOUTS["pairs of text"]), tokenizer, packing=True)
    trainer = make_trainer(prepared.train, model, tokenizer, tmp_path, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch  # with one, packed rows would attend to each other
    learned = tokenizer.decode([label for label in batch["labels"][0].tolist() if label != -100])
    assert sorted(learned.split("<|endoftext|>")) == sorted(["", *(f" {answer}" for answer in ANSWERS)])
    loss = trainer.evaluate(prepared.test)["eval_loss"]
    alone = make_trainer(prepared.train, model, tokenizer, tmp_path)
    assert alone.evaluate(prepared.test)["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_a_prompt_that_fills_a_block_is_left_out_and_counted(tmp_path, tokenizer, model):
    rows = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS * 5, ANSWERS * 5, strict=True)]
    rows[7]["prompt"] = "Why? " * 300
    path = in_splits(tmp_path, rows, held_out=rows[:5])
    note = "1 of 30 rows were left out: 1 no token in the loss among those that are kept"
    prepared = prepare(path, tokenizer)
    assert any(line.endswith(note) for line in prepared.notes)
    theirs = make_trainer(datasets.Dataset.from_list(rows), model, tokenizer, tmp_path)
    assert len(prepared.train) == len(theirs.train_dataset) == 29  # which TRL does without a word
    assert len(prepare(path, tokenizer, {"completion_only_loss": False}).train) == 30
    with pytest.raises(DataError, match=r"(\d+) of \1 rows cannot be used: \1 no token in the loss"):
        prepare(path, tokenizer, block_size=4)


def test_a_prompt_that_fills_a_block_stays_where_trl_keeps_its_answer(tmp_path, tokenizer, model):
    rows = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS * 5, ANSWERS * 5, strict=True)]
    rows[7]["prompt"] = "Why? " * 300
    path = in_splits(tmp_path, rows, held_out=rows[:5])
    assert len(prepare(path, tokenizer, {"packing_strategy": "bfd_split"}, packing=True).train) == 30
    assert len(prepare(path, tokenizer, {"truncation_mode": "keep_end"}).train) == 30


def test_a_conversation_without_an_answer_in_a_block_is_left_out_and_counted(tmp_path, tokenizer, model):
    rows = [{"messages": copy.deepcopy(messages)} for messages in MESSAGES * 5]
    rows[7]["messages"][0]["content"] = "Why? " * 300
    path = in_splits(tmp_path, rows, held_out=rows[:5])
    prepared = prepare(path, tokenizer, {"assistant_only_loss": True})
    theirs = make_trainer(datasets.Dataset.from_list(rows), model, tokenizer, tmp_path, assistant_only_loss=True)
    assert len(prepared.train) == len(theirs.train_dataset) == 29
    assert len(prepare(path, tokenizer).train) == 30


IDLE = [
    ("messages", {"completion_only_loss": True}, {}, r"`completion_only_loss: true` has no effect: .*`messages`"),
    ("conversations", {"completion_only_loss": True}, {}, "or set `assistant_only_loss: true`"),
    ("text", {"completion_only_loss": True}, {}, r"has `text` \(text\), and only `prompt` and `completion`"),
    ("text", {"assistant_only_loss": True}, {}, "`assistant_only_loss: True` has no effect"),
    ("pairs of text", {"assistant_only_loss": True}, {}, "no chat template is applied to text"),
    ("pairs of text", {"chat_template_path": "chat.jinja"}, {}, "`chat_template_path: chat.jinja` has no effect"),
    ("messages", {"packing_strategy": "bfd"}, {}, "no effect without `data.packing: true`"),
    ("messages", {"packing_strategy": "wrapped"}, {"packing": True}, "attend to each other"),
    ("messages", {"truncation_mode": "keep_end"}, {"packing": True}, "`truncation_mode` has no effect"),
    ("messages", {"max_length": 128}, {}, r"`max_length: 128`: in a recipe, `data\.block_size` sets it"),
    ("messages", {"packing": True}, {}, r"`data\.packing` sets it"),
    ("text", {"dataset_text_field": "body"}, {}, r"`data\.text_column` sets it"),
    ("messages", {"dataset_kwargs": {"skip_prepare_dataset": True}}, {}, "would skip the tokenization"),
    ("messages", {}, {"text_column": "body"}, "`text_column: body` has no effect"),
]


@pytest.mark.parametrize(("layout", "train", "settings", "message"), IDLE, ids=str)
def test_a_setting_without_effect_is_refused(tmp_path, tokenizer, layout, train, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(write(tmp_path / "rows.jsonl", LAYOUTS[layout]), tokenizer, train, **settings)


def test_settings_that_say_what_the_data_section_says_are_allowed(tmp_path, tokenizer):
    train = {"max_length": 256, "packing": True, "packing_strategy": "bfd_split", "completion_only_loss": False}
    prepare(write(tmp_path / "rows.jsonl", LAYOUTS["messages"]), tokenizer, train, packing=True)


def test_a_template_that_marks_no_answers_is_refused_for_their_loss(tmp_path, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    with pytest.raises(ConfigError, match=r"needs a chat template with `\{% generation %\}`"):
        prepare(write(tmp_path / "rows.jsonl", LAYOUTS["messages"]), tokenizer, {"assistant_only_loss": True})


def test_tools_are_refused_by_the_plain_template(tmp_path, tokenizer):
    with pytest.raises(DataError, match="the plain template has no tools"):
        prepare(write(tmp_path / "rows.jsonl", LAYOUTS["tools"]), tokenizer)


def test_a_chat_template_to_come_is_not_replaced(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", LAYOUTS["messages"])
    prepared = prepare(path, tokenizer, {"chat_template_path": "chat.jinja"})
    assert tokenizer.chat_template is None
    assert len(prepared.notes) == 1


TEXT, PAIR = LAYOUTS["pairs of text"][0], LAYOUTS["pairs of messages"][0]
MIXED = [
    ([TEXT, PAIR], "`prompt` is text in some rows and messages in others"),
    ([{"prompt": TEXT["prompt"], "completion": PAIR["completion"]}], "one of `prompt` and `completion` is text"),
    ([LAYOUTS["messages"][0], TEXT], "columns of 2 layouts .*`messages` and `prompt` and `completion`"),
    ([{**LAYOUTS["messages"][0], **LAYOUTS["conversations"][0]}], "columns of 2 layouts"),
    ([{**LAYOUTS["messages"][0], "images": ["a.png"]}], "`kind: chat` reads no images: use `kind: llava`"),
    ([{"input_ids": [1, 2], "labels": [1, 2]}], "these rows are tokenized"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "no column `completion`"),
]


@pytest.mark.parametrize(("rows", "message"), MIXED, ids=[message for _, message in MIXED])
def test_layouts_that_trl_cannot_read_are_refused(tmp_path, tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        prepare(write(tmp_path / "rows.jsonl", rows * 3), tokenizer)


def test_tables_of_one_split_with_several_layouts_are_refused(tmp_path, tokenizer):
    write(tmp_path / "train-0.jsonl", LAYOUTS["messages"])
    write(tmp_path / "train-1.jsonl", LAYOUTS["pairs of text"])
    with pytest.raises(DataError, match="columns of 2 layouts"):
        prepare(str(tmp_path), tokenizer)


def test_splits_with_different_layouts_are_refused(tmp_path, tokenizer):
    path = in_splits(tmp_path, LAYOUTS["messages"], held_out=LAYOUTS["pairs of text"])
    with pytest.raises(DataError, match=r"train split has `messages` \(messages\) and the \w+ split `prompt` and"):
        prepare(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "completion": ""}, "no text in `completion`"),
        ({"prompt": None, "completion": "b"}, "no text in `prompt`: NoneType"),
        ({"prompt": MESSAGES[0][:1], "completion": []}, "nothing in `completion`"),
        ({"prompt": MESSAGES[0], "completion": MESSAGES[1][:1]}, "no answer in `completion`"),
        ({"text": " "}, "no text in `text`"),
    ],
)
def test_problems_of_rows_are_named(tmp_path, tokenizer, row, problem):
    layout = "text" if "text" in row else f"pairs of {'messages' if isinstance(row['prompt'], list) else 'text'}"
    with pytest.raises(DataError, match=f"row 6 .{problem}"):
        prepare(write(tmp_path / "rows.jsonl", [*LAYOUTS[layout], row]), tokenizer)


def test_a_prompt_may_be_empty(tmp_path, tokenizer):
    rows = [*LAYOUTS["pairs of text"], {"prompt": "", "completion": "Hello."}]
    path = in_splits(tmp_path, rows)
    assert prepare(path, tokenizer).train[6] == rows[6]


def test_cells_of_the_chat_template_are_made_what_trl_reads(tmp_path, tokenizer, model):
    """TRL parses `tools` that are text, and takes a null of `chat_template_kwargs` for a dictionary."""
    tokenizer.chat_template = TOOL_TEMPLATE
    cells = [("", None), (None, {"mood": "glad"}), ('[{"type": "function"}]', {})]
    rows = [
        {"messages": messages, "tools": tools, "chat_template_kwargs": keywords}
        for messages, (tools, keywords) in zip(MESSAGES * 5, cells * 10, strict=True)
    ]
    train = prepare(in_splits(tmp_path, rows, held_out=rows[:5]), tokenizer).train
    assert train[:3]["tools"] == [None, None, '[{"type": "function"}]']
    trainer = make_trainer(train, model, tokenizer, tmp_path)
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset.select(range(3))]
    assert [text.partition("|")[0] for text in texts] == ["0 tools, calm", "0 tools, glad", "1 tools, calm"]


def test_a_column_without_any_value_is_none(tmp_path, tokenizer):
    rows = [{"messages": messages, "tools": None, "chat_template_kwargs": None} for messages in MESSAGES]
    train = prepare(in_splits(tmp_path, rows, held_out=rows[:5]), tokenizer).train
    assert train.column_names == ["messages"]


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"tools": "[{"}, "1 `tools` that is no JSON"),
        ({"tools": "{}"}, "1 `tools` that is no list"),
        ({"chat_template_kwargs": ["x"]}, "1 `chat_template_kwargs` that is no object"),
    ],
)
def test_bad_cells_of_the_chat_template_are_counted(tmp_path, tokenizer, cells, problem):
    others = {name: "[]" if name == "tools" else {"mood": "glad"} for name in cells}
    rows = [{"messages": messages, **others} for messages in MESSAGES * 5]
    rows[7] = {**rows[7], **cells}
    prepared = prepare(in_splits(tmp_path, rows, held_out=rows[:5]), tokenizer)
    assert any(note.endswith(f"1 of 30 rows were left out: {problem}") for note in prepared.notes)


def test_keywords_for_the_chat_template_are_no_text(tmp_path, tokenizer):
    rows = [{"messages": messages, "chat_template_kwargs": "mood"} for messages in MESSAGES]
    with pytest.raises(DataError, match=r"column `chat_template_kwargs` is .*string, not objects"):
        prepare(in_splits(tmp_path, rows, held_out=rows[:5]), tokenizer)


@pytest.mark.parametrize("train", [{"eval_packing": True}, {"eval_packing": True, "packing_strategy": "bfd"}])
def test_rows_of_evaluation_are_not_packed_alone(tmp_path, tokenizer, train):
    path = in_splits(tmp_path, LAYOUTS["messages"], held_out=LAYOUTS["messages"])
    with pytest.raises(ConfigError, match=r"`eval_packing: true` without `data.packing: true` lets rows"):
        prepare(path, tokenizer, train)
    prepare(path, tokenizer, {"eval_packing": False})
    prepare(path, tokenizer, train, packing=True)
