"""Chat data: layouts, checks of rows, splits, and the template for tokenizers without one."""

import copy
import json

import datasets
import pytest

from symphony_hf.data.chat_template import CHAT_TEMPLATE
from symphony_hf.data.embedded import described_names
from symphony_hf.data.messages import ROLES_WITH_TOOLS, to_messages
from symphony_hf.data.prepare import prepare_data
from symphony_hf.errors import DataError
from symphony_hf.recipe import DataSection

PAIRS = [(f"What is {number} plus one?", f"It is {number + 1}.") for number in range(100)]
MESSAGES = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in PAIRS]
FORMS = {
    "messages": [{"messages": messages, "id": number} for number, messages in enumerate(MESSAGES)],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
    "texts": [{"prompt": q, "completion": a} for q, a in PAIRS],
    "turns": [{"prompt": messages[:1], "completion": messages[1:]} for messages in MESSAGES],
}


@pytest.fixture
def own_tokenizer(tokenizer):
    """Return a copy, which is given a template."""
    return copy.deepcopy(tokenizer)


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(path, tokenizer, **settings):
    return prepare_data(DataSection(kind="chat", path=path, **settings), tokenizer, seed=0)


def all_messages(prepared):
    return [row["messages"] for row in all_rows(prepared)]


def all_rows(prepared):
    return [row for split in ("train", "validation", "test") for row in getattr(prepared, split)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("form", "same_as"), [("messages",) * 2, ("sharegpt", "messages"), ("texts",) * 2, ("turns",) * 2]
)
def test_every_layout_keeps_its_columns(tmp_path, own_tokenizer, form, same_as, suffix):
    prepared = chats(write(tmp_path / f"rows{suffix}", FORMS[form]), own_tokenizer)
    columns = ["messages"] if same_as == "messages" else ["prompt", "completion"]
    expected = [{column: row[column] for column in columns} for row in FORMS[same_as]]
    assert sorted(all_rows(prepared), key=str) == sorted(expected, key=str)
    assert prepared.train.column_names == columns
    assert prepared.collator is None
    assert len(prepared.train) > 80
    assert 0 < len(prepared.validation) < 20


def test_a_conversation_is_in_the_same_split_in_every_layout_and_order(tmp_path, own_tokenizer):
    plain = chats(write(tmp_path / "plain.jsonl", FORMS["messages"]), own_tokenizer)
    for form in ("sharegpt", "texts", "turns"):
        turned = chats(write(tmp_path / f"{form}.jsonl", FORMS[form][::-1]), own_tokenizer)
        for split in ("train", "validation", "test"):
            number = {row["messages"][0]["content"] for row in getattr(plain, split)}
            assert number == {question_of(row) for row in getattr(turned, split)}


def question_of(row):
    prompt = row["messages"] if "messages" in row else row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def test_splits_of_a_folder_are_kept(tmp_path, own_tokenizer):
    for split, rows in (("train", FORMS["messages"][:50]), ("valid", FORMS["messages"][50:60])):
        write(tmp_path / f"{split}.jsonl", rows)
    prepared = chats(str(tmp_path), own_tokenizer)
    assert [row["messages"] for row in prepared.validation] == MESSAGES[50:60]
    assert sorted(all_messages(prepared), key=str) == sorted(MESSAGES[:60], key=str)


def test_splits_of_a_folder_may_be_named_for_fine_tuning(tmp_path, own_tokenizer):
    for split, rows in (("train_sft", FORMS["messages"][:60]), ("test_sft", FORMS["messages"][60:])):
        write(tmp_path / f"{split}-00000-of-00001.parquet", rows)
    prepared = chats(str(tmp_path), own_tokenizer)
    assert [row["messages"] for row in prepared.test] == MESSAGES[60:]
    assert len(prepared.train) + len(prepared.validation) == 60


def test_splits_of_the_hub_may_be_named_for_fine_tuning(monkeypatch, own_tokenizer):
    splits = {"train_sft": FORMS["messages"][:60], "test_sft": FORMS["messages"][60:], "train_gen": []}

    def load_dataset(name, config=None, revision=None):
        assert (name, config, revision) == ("owner/name", None, "v2")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = chats("owner/name", own_tokenizer, revision="v2")
    assert [row["messages"] for row in prepared.test] == MESSAGES[60:]
    assert len(prepared.train) + len(prepared.validation) == 60


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "no answer"),
        (None, "no answer"),
        ([{"role": "user", "content": "Anyone?"}], "no answer"),
        (["Hello!"], "a turn that is no object: str"),
        ([{"role": "tool", "content": "42"}], "an unknown role: 'tool'"),
        ([{"role": "user", "content": " "}], "a turn without text: of 'user'"),
        ([{"from": "human", "value": None}], "a turn without text: of 'human'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content that is not a string: list"),
        ([{"from": "gpt", "value": "Hello!"}], "roles out of turn: 'assistant' as number 1"),
        (
            [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")],
            "roles out of turn: 'assistant' as number 3",
        ),
        (
            [{"role": role, "content": "x"} for role in ("user", "system", "assistant")],
            "roles out of turn: 'system' as number 2",
        ),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(turns, problem):
    assert to_messages(turns)[1] == problem


def test_an_instruction_of_the_system_may_come_first_and_a_question_last():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert to_messages(turns) == (turns, "")


def test_tools_may_be_called_before_an_answer():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    turns = [{"role": "user", "content": "2 + 2?"}, call, {"role": "tool", "content": "4"}]
    turns.append({"role": "assistant", "content": "4."})
    assert to_messages(turns, ROLES_WITH_TOOLS) == (turns, "")
    assert to_messages(turns[:2], ROLES_WITH_TOOLS) == (turns[:2], "")
    assert to_messages(turns[:3], ROLES_WITH_TOOLS)[1] == "no answer"


def test_bad_rows_are_counted_and_left_out(tmp_path, own_tokenizer):
    rows = copy.deepcopy(FORMS["messages"])
    rows[3]["messages"][0]["role"] = "narrator"
    rows[50]["messages"][1]["content"] = ""
    rows[70]["messages"][1]["content"] = None
    path = write(tmp_path / "rows.jsonl", rows)
    prepared = chats(path, own_tokenizer)
    assert len(all_messages(prepared)) == 97
    assert (
        f"{path}, train split: 3 of 100 rows were left out: 2 a turn without text, 1 an unknown role" in prepared.notes
    )


def test_conversations_that_the_template_refuses_are_counted(tmp_path, own_tokenizer):
    own_tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system, please') }}"
        "{% endif %}{{ message['content'] }}{% endfor %}"
    )
    rows = copy.deepcopy(FORMS["messages"])
    rows[9]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    path = write(tmp_path / "rows.jsonl", rows)
    prepared = chats(path, own_tokenizer)
    assert len(all_messages(prepared)) == 99
    left_out = f"{path}, train split: 1 of 100 rows were left out: 1 a conversation that the chat template refuses"
    assert left_out in prepared.notes


@pytest.mark.parametrize("loss", [None, True, False])
def test_a_completion_that_the_template_refuses_is_counted_whatever_is_in_the_loss(tmp_path, own_tokenizer, loss):
    """TRL renders it in any case. The plain template has no tools."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    completion = [call, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "One."}]
    rows = [*FORMS["turns"][:60], {"prompt": MESSAGES[60][:1], "completion": completion}]
    section = DataSection(kind="chat", path=write(tmp_path / "rows.jsonl", rows))
    train = {} if loss is None else {"completion_only_loss": loss}
    prepared = prepare_data(section, own_tokenizer, seed=0, train=train)
    assert len(all_rows(prepared)) == 60
    assert any("1 a conversation that the chat template refuses" in note for note in prepared.notes)


def test_too_many_bad_rows_are_an_error_that_shows_the_first(tmp_path, own_tokenizer):
    rows = copy.deepcopy(FORMS["messages"])
    for row in rows[5:16]:
        row["messages"][0]["role"] = "narrator"
    with pytest.raises(DataError) as raised:
        chats(write(tmp_path / "rows.jsonl", rows), own_tokenizer)
    for part in (
        "11 of 100 rows cannot be used: 11 an unknown role",
        "row 5 (an unknown role: 'narrator')",
        "At most 10%",
    ):
        assert part in str(raised.value)


def test_missing_columns_are_named(tmp_path, own_tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"message": messages, "id": 1} for messages in MESSAGES])
    with pytest.raises(
        DataError, match=r"no column `messages`; its columns are `message`, `id`; did you mean `message`"
    ):
        chats(path, own_tokenizer)
    path = write(tmp_path / "half.jsonl", [{"prompt": question} for question, _ in PAIRS])
    with pytest.raises(DataError, match="no column `completion`; its columns are `prompt`"):
        chats(path, own_tokenizer)


def test_alpaca_columns_are_refused_with_the_columns_to_make_of_them(tmp_path, own_tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"instruction": q, "input": "", "output": a} for q, a in PAIRS])
    with pytest.raises(DataError, match="into a column `prompt`, and rename `output` to `completion`"):
        chats(path, own_tokenizer)


def test_no_such_file_no_table_and_no_train_split_are_said(tmp_path, own_tokenizer):
    with pytest.raises(DataError, match="no such file or folder"):
        chats(str(tmp_path / "missing.jsonl"), own_tokenizer)
    (tmp_path / "rows.txt").write_text("some text")
    with pytest.raises(DataError, match="not a table; give a file with one of the suffixes"):
        chats(str(tmp_path / "rows.txt"), own_tokenizer)
    with pytest.raises(DataError, match=r"no table for training; .* this folder has rows\.txt"):
        chats(str(tmp_path), own_tokenizer)


def test_tables_of_one_split_with_other_columns_are_an_error(tmp_path, own_tokenizer):
    write(tmp_path / "train-0.jsonl", [{"prompt": "a", "completion": "b"}])
    write(tmp_path / "train-1.jsonl", [{"prompt": 3, "completion": "b"}])
    with pytest.raises(
        DataError, match=r"the tables of one split differ in their columns \(train-0.jsonl, train-1.jsonl\)"
    ):
        chats(str(tmp_path), own_tokenizer)


def test_too_few_rows_for_three_splits_are_an_error(tmp_path, own_tokenizer):
    rows = [FORMS["messages"][0], *[FORMS["messages"][1]] * 20]  # two different ones
    with pytest.raises(
        DataError, match=r"no row for the (validation|test) split; give three different rows or more, or a folder"
    ):
        chats(write(tmp_path / "rows.jsonl", rows), own_tokenizer)


@pytest.mark.parametrize("first", range(0, 90, 9))
def test_few_rows_have_one_in_every_split(tmp_path, own_tokenizer, first):
    rows = FORMS["messages"][first : first + 9]
    prepared = chats(write(tmp_path / "rows.jsonl", rows * 2), own_tokenizer)
    parts = [{str(row) for row in getattr(prepared, split)} for split in ("train", "validation", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 9  # a row and its copy are in the same split


def test_a_limit_takes_as_many_of_each_split(tmp_path, own_tokenizer):
    prepared = chats(write(tmp_path / "rows.jsonl", FORMS["messages"]), own_tokenizer, limit=2)
    assert [len(getattr(prepared, split)) for split in ("train", "validation", "test")] == [2, 2, 2]


# The embedded conversations


def test_embedded_conversations_are_the_librarys_own_words(own_tokenizer):
    prepared = chats(None, own_tokenizer)
    described = dict(described_names())
    assert len(described) > 500
    assert described["bisect.bisect"].startswith("Return the index where to insert item x in list a")
    for question, answer in all_messages(prepared):
        name = question["content"].removeprefix("What does `").removesuffix("` do?")
        assert answer["content"] == described[name]
    assert len(all_messages(prepared)) == len(described)
    assert "docstrings of the standard library of Python 3" in prepared.notes[-1]


def test_a_seed_orders_embedded_conversations_and_holds_out_the_same(own_tokenizer):
    first, again, other = (prepare_data(DataSection(kind="chat"), own_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.train["messages"][:] == again.train["messages"][:]
    assert first.train["messages"][:] != other.train["messages"][:]
    assert sorted(map(str, first.train["messages"])) == sorted(map(str, other.train["messages"]))
    assert first.test["messages"][:] == other.test["messages"][:]
    assert first.revision == again.revision == other.revision


# What the tokenizer is given


def test_a_tokenizer_without_template_and_padding_is_given_both(tmp_path, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert bare.chat_template is None
    prepared = chats(None, bare)
    assert bare.pad_token == "<|endoftext|>"
    rendered = bare.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *MESSAGES[0]], tokenize=False, add_generation_prompt=True
    )
    assert rendered == ("System: Be brief.\nUser: What is 0 plus one?\nAssistant: It is 1.<|endoftext|>\nAssistant:")
    assert any("no chat template" in note for note in prepared.notes)
    assert any("no padding token; its end of text, <|endoftext|>, pads" in note for note in prepared.notes)


def test_the_given_template_marks_answers_and_their_end_as_learned(own_tokenizer):
    own_tokenizer.chat_template = CHAT_TEMPLATE
    encoded = own_tokenizer.apply_chat_template(
        MESSAGES[0] + MESSAGES[1], return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [
        token for token, is_learned in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_learned
    ]
    assert own_tokenizer.decode(learned) == " It is 1.<|endoftext|> It is 2.<|endoftext|>"


def test_a_tokenizers_own_template_and_padding_stay(own_tokenizer):
    own_tokenizer.chat_template = "{{ messages }}"
    prepared = chats(None, own_tokenizer)
    assert own_tokenizer.chat_template == "{{ messages }}"
    assert own_tokenizer.pad_token == "<|pad|>"
    assert len(prepared.notes) == 1


def test_a_tokenizer_that_cannot_be_given_them_is_refused(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="neither a chat template nor an end-of-text token"):
        chats(None, bare)
    bare.chat_template = "{{ messages }}"
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token: set its `pad_token`"):
        chats(None, bare)
