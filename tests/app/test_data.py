"""Tables and text: encodings from public or released values only, and nothing rare in anything that leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from app.data_files import PREPROCESSING, prepare, table, table_rows, write
from discreet.app.data import (
    IGNORED,
    Preprocessing,
    TableInput,
    TextUnits,
    digits,
    input_from_json,
    open_source,
)
from discreet.app.data.labels import ClassList, public_classes
from discreet.app.data.schema import parse_schema
from discreet.app.data.split import TEST_FRACTION, is_test_row
from discreet.core.histogram import Counts, _bounded_counts
from discreet.errors import ConfigError, DataError
from discreet.privacy.accounting import Gaussian, Selection

PUBLIC = parse_schema(
    {
        "target": {"name": "label", "classes": ["no", "yes"]},
        "column": {
            "age": {"type": "number", "min": 0, "max": 100},
            "job": {"type": "category", "values": ["baker", "clerk", "smith"]},
            "gain": {"type": "number", "min": 0, "max": 10000},
            "flag": {"type": "category", "values": ["0", "1"]},
        },
    },
    where="schema",
)


# ---- public schema


def test_a_full_schema_needs_no_query(tmp_path):
    source = open_source(table(tmp_path / "a.csv"), schema=PUBLIC)
    assert source.queries(PREPROCESSING) == ()
    assert source.statistics == ()
    prepared = prepare(source)
    assert prepared.private
    assert prepared.classes == ("no", "yes")
    assert len(prepared.train) == source.examples
    assert len(prepared.train) + len(prepared.test) == 600


def test_encoding_of_public_columns(tmp_path):
    path = write(tmp_path / "a.csv", "age,job,gain,flag,label\n50,clerk,?,1,yes\n200,cook,10000,,no\n")
    test = write(tmp_path / "b.csv", "age,job,gain,flag,label\n50,clerk,?,1,maybe\n")
    prepared = prepare(open_source(path, schema=PUBLIC, test=test))
    age, job, gain, flag = prepared.train.features.split([4, 5, 4, 4], dim=1)
    assert age[:, 0].tolist() == [0.0, 1.0]  # clipped to the public bound
    assert job.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]  # unknown: "another"
    assert gain.tolist() == [[0, 0, 0, 1], [1, 1, 1, 0]]  # missing: zero but for its flag
    assert flag.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert prepared.train.targets.tolist() == [1, 0]
    assert prepared.test.targets.tolist() == [IGNORED]
    assert torch.equal(prepared.test.features[0], prepared.train.features[0])


# ---- private statistics


def test_without_a_schema_everything_is_asked_privately(tmp_path):
    source = open_source(table(tmp_path / "a.csv", 4000), target="label")
    assert source.statistics == ("age", "job", "gain", "flag", "label")
    assert source.queries(PREPROCESSING) == (Gaussian(noise_multiplier=2.0), Selection(delta=1e-6))
    prepared = prepare(source)
    assert prepared.classes == ("no", "yes")
    assert not prepared.private  # a test seed
    by_name = {column["name"]: column for column in prepared.record["columns"]}
    assert by_name["age"]["encodings"][0]["as"] == "number"
    assert 16 <= by_name["age"]["encodings"][0]["min"] <= 24
    assert 64 <= by_name["age"]["encodings"][0]["max"] <= 80
    assert [encoding["as"] for encoding in by_name["job"]["encodings"]] == ["category"]
    assert set(by_name["job"]["encodings"][0]["values"]) == {"baker", "clerk", "smith"}
    assert set(by_name["flag"]["encodings"][-1]["values"]) == {"0", "1"}
    assert all(column["source"] == "released" for column in by_name.values())
    assert prepared.input == TableInput(features=prepared.train.features.shape[1])
    assert any("charged to the ledger" in statement for statement in prepared.statements)


def test_only_the_columns_that_the_schema_leaves_open_are_asked(tmp_path):
    schema = parse_schema(
        {
            "target": {"name": "label", "classes": ["no", "yes"]},
            "column": {
                "age": {"type": "number"},
                "job": {"type": "category"},
                "gain": {"type": "drop"},
                "flag": {"type": "number", "min": 0, "max": 1},
            },
        },
        where="schema",
    )
    source = open_source(table(tmp_path / "a.csv", 4000), schema=schema)
    assert source.statistics == ("age", "job")
    assert [column["name"] for column in prepare(source).record["columns"]] == ["age", "job", "flag"]


def test_noise_is_a_function_of_the_key(tmp_path):
    source = open_source(table(tmp_path / "a.csv", 2000), target="label")
    assert prepare(source).record == prepare(source).record
    assert prepare(source).record != prepare(source, seed=1).record


@pytest.mark.parametrize("row", [
    "18,clerk,0,0,yes", ",,,,", "nan,inf,-inf,NaN,None", "1e308,-1e308,1e-320,-0.0,0", "é,\u2028x,'',`,x",
    f"{'9' * 300},{'x' * 100},{'y' * 101},{'z' * 5000},q", "?,?,?,?,?", "1_000,0x10,٣,１,yes",
])  # fmt: skip
def test_a_neighbouring_row_moves_the_request_by_at_most_its_sensitivity(tmp_path, row):
    """The request is rebuilt from two files that differ in one row; L2 over all counts, present names or not."""
    totals = []
    for name, extra in (("with.csv", (row,)), ("without.csv", ())):
        test = write(tmp_path / "test.csv", "age,job,gain,flag,label\n1,clerk,1,1,yes\n")
        source = open_source(table(tmp_path / name, 60, extra=extra), target="label", test=test)
        request = source._request
        totals.append(_bounded_counts(buckets=request.buckets, names=request.names, examples=source.examples))
    zero = torch.zeros(1, dtype=torch.float64)
    keys = totals[0].tensors.keys() | totals[1].tensors.keys()
    square = sum(
        float((totals[0].tensors.get(key, zero) - totals[1].tensors.get(key, zero)).square().sum()) for key in keys
    )
    assert totals[0].sensitivity == totals[1].sensitivity == 3.0  # 4 columns twice, and the target
    assert square <= 9.0 + 1e-9


def test_a_canary_is_in_nothing_that_leaves(tmp_path):
    canary = "CANARY-61803"
    extra = (f"20,{canary},5,1,yes", f"20,clerk,5,1,{canary}", f"61803,{canary},61803,1,no")
    for seed in range(20):
        path = table(tmp_path / "a.csv", 2000, extra=extra)
        prepared = prepare(open_source(path, target="label", test=path), seed=seed)
        assert "61803" not in json.dumps(prepared.record)
        assert "61803" not in repr((prepared.classes, prepared.statements, prepared.input))
    assert (prepared.train.targets == IGNORED).sum() == 1


def test_too_few_rows_for_a_private_class_list_name_the_remedy(tmp_path):
    source = open_source(table(tmp_path / "a.csv", 40), target="label")
    with pytest.raises(DataError, match="classes = "):
        prepare(source, preprocessing=Preprocessing(noise_multiplier=20.0, delta=1e-6))


def test_without_noise_the_same_path_is_not_private(tmp_path):
    source = open_source(table(tmp_path / "a.csv", 300), target="label")
    exact = Preprocessing.share(epsilon=float("inf"), delta=1e-5)
    assert source.queries(exact) == (Gaussian(noise_multiplier=0.0),)
    prepared = prepare(source, preprocessing=exact)
    assert not prepared.private
    assert any("WITHOUT noise" in statement for statement in prepared.statements)


def test_without_noise_rare_names_make_no_features(tmp_path):
    """Else the comparison run would memorise unique values, and be slower and worse than the private one."""
    rows = [f"{i},{'ab'[i % 2]},{i / 7},{'yes' if i % 3 else 'no'}" for i in range(3000)]
    path = write(tmp_path / "a.csv", "\n".join(["id,kind,measure,label", *rows]))
    prepared = prepare(
        open_source(path, target="label", test=path), preprocessing=Preprocessing(noise_multiplier=0.0, delta=0.0)
    )
    assert prepared.input.features < 30
    by_name = {column["name"]: column["encodings"] for column in prepared.record["columns"]}
    assert [encoding["as"] for encoding in by_name["id"]] == ["number"]
    assert by_name["kind"] == [{"as": "category", "values": ["a", "b"]}]


def test_share_of_the_budget():
    """mu_total^2 = mu_train^2 + 1 / sigma^2, with 2 % for the counts."""
    share = Preprocessing.share(epsilon=8.0, delta=1e-5)
    assert share.noise_multiplier == pytest.approx(1 / (1.666 * 0.02**0.5), rel=1e-3)
    assert share.delta == pytest.approx(5e-7)


@pytest.mark.parametrize(
    "numbers",
    [
        {"noise_multiplier": -1.0, "delta": 0.1},
        {"noise_multiplier": 1.0, "delta": 1.0},
        {"noise_multiplier": float("nan"), "delta": 0.1},
    ],
)
def test_preprocessing_out_of_range(numbers):
    with pytest.raises(ConfigError):
        Preprocessing(**numbers)


# ---- labels and split


def test_labels_match_without_a_last_dot_or_spaces():
    classes = public_classes(["<=50K", ">50K"])
    assert classes.encode(["<=50K", " >50K.", ">50K.", ">50K..", "50K"]).tolist() == [0, 1, 1, IGNORED, IGNORED]
    assert public_classes(["a.", "a"]).encode(["a.", "a"]).tolist() == [0, 1]


@pytest.mark.parametrize("classes", [1, ["a"], ["a", "a"], []])
def test_class_lists_that_are_none(classes):
    with pytest.raises(ConfigError):
        public_classes(classes)


def test_the_split_is_a_function_of_each_row(tmp_path):
    rows = table_rows(3000)
    held_out = [is_test_row(row.split(",")) for row in rows]
    assert sum(held_out) == pytest.approx(TEST_FRACTION * 3000, abs=5 * (3000 * 0.16) ** 0.5)
    whole = open_source(table(tmp_path / "a.csv", 3000), schema=PUBLIC)
    assert whole.examples == 3000 - sum(held_out)
    doubled = write(tmp_path / "b.csv", "\n".join(["age,job,gain,flag,label", *rows, *rows[:100]]))
    assert open_source(doubled, schema=PUBLIC).examples == whole.examples + 100 - sum(held_out[:100])


def test_fields_do_not_run_into_each_other():
    sides = {is_test_row(("ab" * i, "c")) == is_test_row(("ab" * i + "c", "")) for i in range(64)}
    assert sides == {True, False}


# ---- examples, digits, real data


def test_examples_are_a_map_style_data_set(tmp_path):
    train = prepare(open_source(table(tmp_path / "a.csv"), schema=PUBLIC)).train
    features, targets = train.batch(np.array([3, 1, 3]))
    assert torch.equal(features[0], train[3][0])
    assert torch.equal(features[0], features[2])
    assert int(targets[1]) == int(train[1][1])
    assert train.batch(np.array([], dtype=np.int64))[0].shape == (0, train.features.shape[1])
    assert int(train[-1][1]) == int(train.targets[-1])
    with pytest.raises(IndexError):
        train[len(train)]


def test_digits():
    prepared = digits()
    assert len(prepared.train) + len(prepared.test) == 1797
    assert len(prepared.classes) == 10
    assert prepared.input.to_json() == {"kind": "images", "channels": 1, "height": 8, "width": 8}
    assert input_from_json(prepared.input.to_json()) == prepared.input
    assert float(prepared.train.features.min()) == -1.0
    assert float(prepared.train.features.max()) == 1.0


def test_counts_never_hold_rows(tmp_path):
    """The type that leaves the core has no field that could hold a raw count."""
    assert set(Counts.__dataclass_fields__) == {"buckets", "names", "noise_std", "threshold", "private"}


@pytest.mark.slow
def test_adult(data_dir):
    names = "age,workclass,fnlwgt,education,education_num,marital_status,occupation,relationship,race,sex"
    names += ",capital_gain,capital_loss,hours_per_week,native_country,income"
    source = open_source(
        data_dir / "adult/adult.data", target="income", columns=names.split(","), test=data_dir / "adult/adult.test"
    )
    assert source.examples == 32561
    prepared = prepare(source, preprocessing=Preprocessing.share(epsilon=3.0, delta=1e-5))
    assert prepared.classes == ("<=50K", ">50K")
    assert len(prepared.test) == 16281
    assert int((prepared.test.targets == IGNORED).sum()) == 0
    assert not any("Not used" in statement for statement in prepared.statements)


def test_fingerprints_tell_data_and_settings_apart(tmp_path):
    path = table(tmp_path / "a.csv", 100)
    again = table(tmp_path / "copy.csv", 100)
    other = table(tmp_path / "b.csv", 100, extra=("20,clerk,5,1,yes",))
    whole = {
        "plain": open_source(path, target="label").fingerprint(),
        "other rows": open_source(other, target="label").fingerprint(),
        "other schema": open_source(path, schema=PUBLIC).fingerprint(),
        "other classes": open_source(path, target="label", classes=["yes", "no"]).fingerprint(),
        "other target": open_source(path, target="flag").fingerprint(),
        "other test": open_source(path, target="label", test=path).fingerprint(),
        "text": open_source(path, target="label", text_column="job").fingerprint(),
        "words": open_source(path, target="label", text_column="job", text_units=TextUnits.WORDS).fingerprint(),
    }
    assert len(set(whole.values())) == len(whole)
    assert open_source(again, target="label").fingerprint() == whole["plain"]


def test_the_class_list_is_told_by_name_and_a_long_one_is_cut() -> None:
    said = ClassList(names=("low", "mid", "high"), public=False).statement
    assert "The list of 3 classes was released privately by threshold: low, mid, high. Training rows" in said
    assert "taught nothing" in said
    said = public_classes(77).statement
    assert "The list of 77 classes is public: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 67 more." in said
    said = ClassList(names=("\x1b[31mred\n", "N" * 10_000), public=False).statement
    assert said.isprintable()
    assert len(said) < 250
