"""GLUE tasks as questions: labels, tokens, loss, and refusals."""

import copy
import csv
import json
from pathlib import Path

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.data.datasets import load_table
from symphony_hf.data.embedded import described_names
from symphony_hf.data.glue import _with_answers
from symphony_hf.data.glue_tasks import TASKS, find_task
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.questions import split_shared, tokenize_choices
from symphony_hf.errors import DataError
from symphony_hf.recipe import DataSection

# Of each task, a row of each label, as the Hub has them: the number and GLUE's own name.
LABELS = {
    "cola": {0: ("unacceptable", "no"), 1: ("acceptable", "yes")},
    "sst2": {0: ("negative", "negative"), 1: ("positive", "positive")},
    "mrpc": {0: ("not_equivalent", "no"), 1: ("equivalent", "yes")},
    "qqp": {0: ("not_duplicate", "no"), 1: ("duplicate", "yes")},
    "mnli": {0: ("entailment", "yes"), 1: ("neutral", "maybe"), 2: ("contradiction", "no")},
    "qnli": {0: ("entailment", "yes"), 1: ("not_entailment", "no")},
    "rte": {0: ("entailment", "yes"), 1: ("not_entailment", "no")},
    "wnli": {0: ("not_entailment", "no"), 1: ("entailment", "yes")},
}


def glue_rows(task, number=20):
    columns = TASKS[task].columns
    labels = list(LABELS[task])
    return [
        {**{name: f"The {name} number {row}." for name in columns}, "label": labels[row % len(labels)], "idx": row}
        for row in range(number)
    ]


@pytest.fixture
def hub(monkeypatch):
    """Stand in for GLUE on the Hub, with a hidden test split; `asked` lists what was loaded."""
    asked = []

    def load_dataset(name, config=None, revision=None):
        asked.append((name, config, revision))
        assert name == "nyu-mll/glue"
        names = [LABELS[config][number][0] for number in LABELS[config]]
        features = datasets.Features(
            {**{c: datasets.Value("string") for c in TASKS[config].columns}, "label": datasets.ClassLabel(names=names)}
            | {"idx": datasets.Value("int32")}
        )
        hidden = [{**row, "label": -1} for row in glue_rows(config, 5)]
        splits = {"train": glue_rows(config, 30), TASKS[config].validation: glue_rows(config, 12), "test": hidden}
        if config == "mnli":
            splits |= {"validation_mismatched": glue_rows(config, 3), "test_matched": splits.pop("test")}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def glue(name, tokenizer, path=None, **settings):
    return prepare_data(DataSection(kind="glue", name=name, path=path, **settings), tokenizer, seed=0)


def write_folder(folder, splits, suffix):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}{suffix}"
        if suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            with path.open("w", newline="") as file:
                plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
                writer = csv.DictWriter(file, list(rows[0]), **plain)
                writer.writeheader()
                writer.writerows(rows)
    return str(folder)


def test_all_tasks_of_a_choice_are_there():
    assert set(TASKS) == set(LABELS)


@pytest.mark.parametrize("name", LABELS)
def test_a_task_of_the_hub_becomes_questions(hub, tokenizer, name):
    prepared = glue(name, tokenizer, revision="v3")
    assert hub == [("nyu-mll/glue", name, "v3")]
    assert (len(prepared.train), len(prepared.validation), prepared.test) == (30, 12, None)
    task = TASKS[name]
    for split, number in (("train", 30), ("validation", 12)):
        for index, row in enumerate(glue_rows(name, number)):
            question = getattr(prepared, split).question(index)
            texts = [tokenizer.decode(question.prompt + choice) for choice in question.choices]
            prompt = task.prompt.format(**row)
            assert texts == [f"{prompt} {LABELS[name][label][1]}" for label in LABELS[name]]
            assert question.answer == row["label"]
            assert all(row[column] in prompt for column in task.columns)
    assert ("the test split's labels are hidden" in " ".join(prepared.notes)) == (name != "mnli")


def test_the_answers_tokens_alone_are_learned(hub, tokenizer):
    prepared = glue("mnli", tokenizer)
    total = 0
    for index in range(len(prepared.train)):
        row, question = prepared.train[index], prepared.train.question(index)
        answer = question.choices[question.answer]
        assert row["input_ids"] == question.prompt + answer
        assert row["labels"] == [NO_LABEL] * len(question.prompt) + answer
        total += len(row["input_ids"])
    assert prepared.num_tokens == total
    assert prepared.train.questions()[3] == prepared.train.question(3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right_whatever_the_tokenizer_prefers(hub, tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    prepared = glue("cola", tokenizer)
    batch = next(iter(DataLoader(prepared.train, batch_size=12, collate_fn=prepared.collator)))
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    for index in range(12):
        row, length = prepared.train[index], len(prepared.train[index]["input_ids"])
        assert batch["input_ids"][index].tolist()[:length] == row["input_ids"]
        assert batch["labels"][index].tolist()[:length] == row["labels"]
        assert set(batch["input_ids"][index, length:].tolist()) <= {tokenizer.pad_token_id}
        assert set(batch["labels"][index, length:].tolist()) <= {NO_LABEL}
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
    assert (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
def test_local_tables_are_the_same_questions(tmp_path, tokenizer, suffix, named):
    rows = glue_rows("rte", 20)
    rows[0]["sentence1"] = 'An unfinished "quotation'
    if named:
        rows = [{**row, "label": LABELS["rte"][row["label"]][0]} for row in rows]
    path = write_folder(tmp_path / "rte", {"train": rows, "validation": rows[:6], "test": rows[6:9]}, suffix)
    prepared = glue("rte", tokenizer, path)
    expected = [LABELS["rte"][number % 2][1] for number in range(20)]
    answers = [prepared.train.question(index) for index in range(20)]
    assert [tokenizer.decode(q.choices[q.answer]).strip() for q in answers] == expected
    assert 'An unfinished "quotation' in tokenizer.decode(answers[0].prompt)
    assert (len(prepared.validation), len(prepared.test)) == (6, 3)


def test_a_missing_validation_split_is_cut_from_train(tmp_path, tokenizer):
    path = write_folder(tmp_path, {"train": glue_rows("sst2", 200)}, ".csv")
    prepared = glue("sst2", tokenizer, path)
    assert len(prepared.train) + len(prepared.validation) == 200
    assert 0 < len(prepared.validation) < 30
    assert any("no validation split, so 5% of train are held out" in note for note in prepared.notes)


@pytest.mark.parametrize("others", [(), ("validation_mismatched", "validation")])
def test_a_folder_of_mnli_has_the_splits_of_the_hub(tmp_path, tokenizer, others):
    rows = glue_rows("mnli", 40)
    splits = {"train": rows[:30], "validation_matched": rows[30:], **dict.fromkeys(others, rows[:3])}
    prepared = glue("mnli", tokenizer, write_folder(tmp_path / "mnli", splits, ".parquet"))
    assert (len(prepared.train), len(prepared.validation)) == (30, 10)


@pytest.mark.parametrize(
    ("path", "config"),
    [("me/sentences", None), ("me/sentences:small", "small"), ("me/mirror", "qnli"), ("nyu-mll/glue", "qnli")],
)
def test_a_data_set_of_the_hub_has_the_tasks_configuration_or_its_own(monkeypatch, tokenizer, path, config):
    asked = []

    def load_dataset(name, config=None, revision=None):
        asked.append((name, config))
        rows = datasets.Dataset.from_list(glue_rows("qnli"))
        return datasets.DatasetDict({"train": rows, "validation": rows})

    def load_dataset_builder(name, config=None, revision=None):
        if config not in names[name]:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: {names[name]}")

    names = {"me/sentences": ["default", "small"], "me/mirror": ["qnli", "rte"]}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    glue("qnli", tokenizer, path)
    assert asked == [(path.partition(":")[0], config)]


class Downloaded(datasets.GeneratorBasedBuilder):
    """Writes a data set of the Hub into the cache."""

    def _info(self):
        return datasets.DatasetInfo()

    def _split_generators(self, manager):
        return [datasets.SplitGenerator(name) for name in ("train", "validation")]

    def _generate_examples(self):
        number = 3 if self.config.name == "rte" else 20
        yield from enumerate(glue_rows("qnli", number))


@pytest.mark.parametrize("configs", [("qnli", "rte"), ("default",)])
def test_a_data_set_of_the_cache_has_the_tasks_configuration_or_its_own(tokenizer, configs):
    """Offline, `datasets` does not list its configurations."""
    for config in configs:
        Downloaded(repo_id="me/mirror", dataset_name="mirror", config_name=config, hash="0" * 40).download_and_prepare()
    prepared = glue("qnli", tokenizer, "me/mirror")
    assert (len(prepared.train), prepared.revision) == (20, "0" * 40)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_words_that_pandas_takes_for_missing_are_words(tmp_path, tokenizer, suffix):
    rows = glue_rows("sst2", 40)
    for row, word in zip(rows, ["None", "NA", "null", "n/a", "nan"], strict=False):
        row["sentence"] = word
    path = write_folder(tmp_path / "sst2", {"train": rows, "validation": rows}, suffix)
    texts = [tokenizer.decode(question.prompt) for question in glue("sst2", tokenizer, path).validation.questions()]
    assert all(row["sentence"] in text for row, text in zip(rows, texts, strict=True))
    assert "None" in texts[0]
    rows[3]["sentence"] = ""
    table = load_table(Path(write_folder(tmp_path / "empty", {"train": rows}, suffix)) / f"train{suffix}")
    assert [row for row, text in enumerate(table["sentence"]) if text is None] == [3]


def test_a_limit_takes_as_many_of_each_split(hub, tokenizer):
    prepared = glue("qnli", tokenizer, limit=4)
    assert (len(prepared.train), len(prepared.validation)) == (4, 4)
    expected = TASKS["qnli"].prompt.format(**glue_rows("qnli", 30)[7])
    assert tokenizer.decode(prepared.train.question(1).prompt) == expected


def test_long_questions_are_left_out_of_training_and_counted(tmp_path, tokenizer):
    rows = glue_rows("cola", 40)
    rows[7]["sentence"] = "very " * 200
    path = write_folder(tmp_path, {"train": rows, "validation": rows[:3]}, ".csv")
    prepared = glue("cola", tokenizer, path)
    assert len(prepared.train) == 39
    assert f"{path}, train split: 1 of 40 rows were left out: 1 longer than block_size" in prepared.notes
    with pytest.raises(DataError, match=r"40 of 40 rows cannot be used: 40 longer than block_size"):
        glue("cola", tokenizer, path, block_size=8)


def test_long_questions_that_are_measured_are_an_error(tmp_path, tokenizer):
    rows = glue_rows("cola", 40)
    rows[7]["sentence"] = "very " * 200
    path = write_folder(tmp_path, {"train": rows[10:], "validation": rows[:10]}, ".csv")
    with pytest.raises(DataError, match=r"1 questions have more .* than block_size 256, (\d+) at most") as raised:
        glue("cola", tokenizer, path)
    longest = int(str(raised.value).split()[-1])
    assert len(glue("cola", tokenizer, path, block_size=longest).validation) == 10
    with pytest.raises(DataError, match="more tokens than block_size"):
        glue("cola", tokenizer, path, block_size=longest - 1)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_row_without_a_sentence_is_left_out_and_counted(tmp_path, tokenizer, suffix):
    """Its sentence is not the word None."""
    rows = glue_rows("qqp", 40)
    rows[7]["question2"] = None
    path = write_folder(tmp_path, {"train": rows, "validation": rows}, suffix)
    prepared = glue("qqp", tokenizer, path)
    for split, questions in (("train", prepared.train), ("validation", prepared.validation)):
        assert len(questions) == 39
        assert not any("None" in tokenizer.decode(question.prompt) for question in questions.questions())
        assert f"{path}, {split} split: 1 of 40 rows were left out: 1 no text in `question2`" in prepared.notes
    for row in rows[:6]:
        row["question1"] = None
    path = write_folder(tmp_path, {"train": rows, "validation": rows[8:]}, suffix)
    with pytest.raises(DataError, match=r"7 of 40 rows cannot be used.* The first is row 0 \(no text in `question1`"):
        glue("qqp", tokenizer, path)


def test_a_sentence_that_is_no_text_is_left_out(tmp_path, tokenizer):
    rows = [{**row, "sentence": 5} for row in glue_rows("sst2", 20)]
    with pytest.raises(DataError, match=r"20 no text in `sentence`\. The first is row 0 .*: int"):
        glue("sst2", tokenizer, write_folder(tmp_path, {"train": rows, "validation": rows}, ".jsonl"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_missing_label_is_an_error_with_its_row_in_the_source(tmp_path, tokenizer, suffix):
    """Without a validation split, too, whose rows are taken from train. Pandas reads the others as 0.0 and 1.0."""
    rows = glue_rows("sst2", 60)
    rows[41]["label"] = None
    with pytest.raises(DataError, match="train split: row 41 has the label None; sst2 has 0 or `negative`"):
        glue("sst2", tokenizer, write_folder(tmp_path, {"train": rows}, suffix))


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("name", ["dev", "valid", "validation"])
def test_a_validation_split_has_any_of_its_names(tmp_path, tokenizer, monkeypatch, place, name):
    rows = glue_rows("sst2", 40)
    splits = {"training": rows[:30], name: rows[30:]}
    if place == "hub":
        tables = {split: datasets.Dataset.from_list(own) for split, own in splits.items()}
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(tables))
    path = "me/sentences:default" if place == "hub" else write_folder(tmp_path, splits, ".jsonl")
    prepared = glue("sst2", tokenizer, path)
    assert (len(prepared.train), len(prepared.validation)) == (30, 10)


# The stand-in


def test_a_mistyped_task_is_an_error_for_the_stand_in_too(tokenizer):
    with pytest.raises(DataError, match=r"no GLUE task `qnlu`; did you mean `qnli`\?"):
        glue("qnlu", tokenizer, "embedded")


@pytest.mark.thorough
def test_the_stand_in_says_what_it_is(tokenizer):
    prepared = glue("wnli", tokenizer, "embedded")
    described = dict(described_names())
    assert "no GLUE: a stand-in made of the docstrings" in prepared.notes[0]
    right = 0
    for question in prepared.train.questions():
        asked, sentence, *_ = tokenizer.decode(question.prompt).splitlines()
        name = asked.removeprefix("Question: What does `").removesuffix("` do?")
        belongs = sentence.removeprefix("Sentence: ") == described[name]
        assert tokenizer.decode(question.choices[question.answer]).strip() == ("yes" if belongs else "no")
        right += belongs
    assert right == (len(prepared.train) + 1) // 2  # as many of one as of the other
    for split in ("validation", "test"):
        assert len(getattr(prepared, split)) > 30
    assert max(len(row["input_ids"]) for row in prepared.train) <= 128  # it is for quick trials
    assert glue("qnli", tokenizer, "embedded").train.questions() == prepared.train.questions()


# Tokens


def test_a_token_that_reaches_across_the_prompts_end_is_the_answers(tokenizer):
    ids = {text: tokenizer(text)["input_ids"] for text in ("return Nothing", "return None")}
    shared, (nothing, none) = tokenize_choices(list(ids), tokenizer)
    assert shared + nothing == ids["return Nothing"]
    assert shared + none == ids["return None"]
    assert nothing[0] != none[0]


def test_special_tokens_that_a_tokenizer_adds_are_in_the_prompt(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    shared, _ = tokenize_choices(["a yes", "a no"], adding)
    assert shared[0] == tokenizer.pad_token_id


def test_answers_of_which_one_begins_another_are_refused():
    with pytest.raises(
        DataError, match=r"cannot be told apart by this tokenizer: all tokens of 'an end' begin another"
    ):
        split_shared([[4, 5], [4, 5, 6]], ["an end", "an ending"])


# What is refused


def test_unknown_tasks_name_the_nearest(tokenizer):
    with pytest.raises(DataError, match=r"no GLUE task `qnlu`; did you mean `qnli`\?"):
        glue("qnlu", tokenizer)
    with pytest.raises(DataError, match="`stsb` is not supported: it asks for a number from 0 to 5"):
        find_task("stsb")
    with pytest.raises(DataError, match="`ax` is not supported: it has no rows to train on"):
        find_task("ax")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "row 4 has the label 2; sst2 has 0 or `negative`, 1 or `positive`"),
        ({"label": -1}, "row 4 has the label -1"),
    ],
)
def test_labels_that_the_task_does_not_have_are_an_error(tmp_path, tokenizer, change, message):
    rows = glue_rows("sst2", 20)
    rows[4] |= change
    path = write_folder(tmp_path, {"train": rows, "validation": rows[:2]}, ".jsonl")
    with pytest.raises(DataError, match=message):
        glue("sst2", tokenizer, path)


def test_a_missing_label_of_named_ones_is_an_error():
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    rows = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": None}]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    with pytest.raises(DataError, match="here: row 1 has the label None; sst2 has 0 or `negative`"):
        _with_answers(table, TASKS["sst2"], "here")


def test_missing_columns_are_named(tmp_path, tokenizer):
    path = write_folder(tmp_path, {"train": glue_rows("mrpc"), "validation": glue_rows("mrpc")}, ".csv")
    with pytest.raises(DataError, match=r"train split: no column `premise`; its columns are `sentence1`, `sentence2`"):
        glue("mnli", tokenizer, path)


def test_an_empty_split_is_an_error(tmp_path, tokenizer):
    path = write_folder(tmp_path, {"train": glue_rows("mrpc")}, ".parquet")
    datasets.Dataset.from_list(glue_rows("mrpc", 1)).select([]).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(DataError, match=r"validation\.parquet: this table has no rows; give one that has"):
        glue("mrpc", tokenizer, path)


def test_a_padding_token_is_made_up_where_there_is_none(hub, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    prepared = glue("rte", bare)
    assert prepared.collator.pad_id == bare.eos_token_id
    assert "had no padding token" in prepared.notes[0]


def test_questions_are_tokenized_once(tmp_path, tokenizer, monkeypatch):
    path = write_folder(tmp_path, {"train": glue_rows("rte"), "validation": glue_rows("rte")}, ".csv")
    first = glue("rte", tokenizer, path)

    def fail(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("symphony_hf.data.glue.tokenize_choices", fail)
    assert glue("rte", tokenizer, path).train.questions() == first.train.questions()
    with pytest.raises(AssertionError, match="tokenized again"):
        glue("rte", tokenizer, path, block_size=300)
