"""`discreet predict` as a user types it: the answers are those that the run itself was judged by."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model

from app.data_files import idx_folder, prepare, table_rows, write
from app.program import CANARY, must_refuse, run_program
from discreet.app import predicting, training
from discreet.app.cli import main
from discreet.app.data import Examples, TextUnits, open_source
from discreet.app.data.columns import CategoryEncoding, NumberEncoding
from discreet.app.data.labels import ClassList
from discreet.app.data.recorded import read_recorded
from discreet.app.data.records import Records, read_records
from discreet.app.data.schema import Schema, read_schema
from discreet.app.data.table_encoding import TableEncoding
from discreet.app.models import rebuild
from discreet.app.predicting import PredictOptions, predict, read_released
from discreet.errors import ConfigError, DataError

HEADER = "age,job,gain,flag,label"
ROWS = [*table_rows(1500), ",clerk,0,1,no", "44,,0,0,yes", "31,diver,100000,1,no", "old,smith,0,0,yes"]
SCHEMA = """
[column.age]
type = "number"
min = 18
max = 80
[column.job]
type = "category"
values = ["clerk", "smith"]
"""


def _train(folder: Path, *words: object) -> None:
    assert main(["train", *[str(word) for word in words], "--epsilon", "8", "--out", str(folder)]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, and beside each the rows that it was tested on."""
    folder = tmp_path_factory.mktemp("runs")
    training_rows = write(folder / "people.csv", "\n".join([HEADER, *ROWS]) + "\n")
    _, held_out = read_records(training_rows, schema=Schema(), columns=None).split()
    write(folder / "people-test.csv", "\n".join([HEADER, *(",".join(row) for row in held_out.rows)]) + "\n")
    known = ("--target", "label", "--classes", "no,yes", "--steps", 15)
    _train(folder / "table", training_rows, *known)
    _train(folder / "cooled", training_rows, *known, "--private-temperature")
    draws = np.random.default_rng(0)
    words = [("buy now", "spam") if coin else ("see you at noon", "ham") for coin in draws.integers(0, 2, 600)]
    lines = [f"{label}\t{text} {draws.integers(0, 50)}" for text, label in words]
    texts = write(folder / "texts.tsv", "\n".join(["label\ttext", *lines[:500]]) + "\n")
    write(folder / "texts-test.tsv", "\n".join(["label\ttext", *lines[500:]]) + "\n")
    text_words = ("--target", "label", "--classes", "ham,spam", "--steps", 15)
    _train(folder / "text", texts, *text_words, "--test", folder / "texts-test.tsv")
    _train(folder / "images", idx_folder(folder / "pictures"), "--classes", 2, "--steps", 15)
    return folder


def _answers(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, str]]:
    code, out, err = run_program(capsys, "predict", *words)
    assert code == 0, err
    return list(csv.DictReader(io.StringIO(out)))


def _result(run: Path) -> dict:
    return json.loads((run / "release" / "result.json").read_text())


@pytest.mark.parametrize(
    ("run", "rows"), [("table", "people-test.csv"), ("cooled", "people-test.csv"), ("text", "texts-test.tsv")]
)
def test_answers_are_those_that_the_run_was_judged_by(
    runs: Path, capsys: pytest.CaptureFixture[str], run: str, rows: str
) -> None:
    found = _answers(capsys, runs / run, runs / rows)
    test = _result(runs / run)["test"]
    assert len(found) == test["examples"]
    assert sum(row["prediction"] == row["label"] for row in found) / len(found) == test["accuracy"]
    likelihoods = [-np.log(float(row[f"probability of {row['label']}"])) for row in found]
    assert np.mean(likelihoods) == pytest.approx(test["nll"], abs=1e-5)


def test_answers_about_images_are_those_of_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _answers(capsys, runs / "images", runs / "pictures" / "t10k-images-idx3-ubyte.gz")
    assert list(found[0]) == ["prediction", "probability of 0", "probability of 1"]
    right = [row["prediction"] == str(position % 2) for position, row in enumerate(found)]
    assert sum(right) / len(right) == _result(runs / "images")["test"]["accuracy"]


def test_the_released_temperature_divides_the_logits(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_program(capsys, "predict", runs / "cooled", runs / "people-test.csv")
    assert code == 0
    temperature = _result(runs / "cooled")["temperature"]
    assert f"divided by the released temperature {temperature:.6g} (release/temperature.json)" in err
    assert "nothing is charged" in err
    found = predict(PredictOptions(run=runs / "cooled", data=runs / "people-test.csv"))
    features = found.rows.features(0, 5)
    with torch.no_grad():
        plain = found.released.model.eval()(features).double()
    torch.testing.assert_close(found.probabilities(0, 5), (plain / temperature).softmax(1))
    told = [float(row["probability of no"]) for row in csv.DictReader(io.StringIO(out))][:5]
    assert told == pytest.approx(found.probabilities(0, 5)[:, 0].tolist(), rel=1e-6)


def test_a_search_is_applied_like_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--target", "label", "--classes", "no,yes", "--epsilon", 8, "--steps", 15, "--learning-rates", 0.02)
    code, _, err = run_program(capsys, "tune", runs / "people.csv", *words, "--runs", 2, "--out", tmp_path / "run")
    assert code == 0, err
    found = _answers(capsys, tmp_path / "run", runs / "people-test.csv")
    right = sum(row["prediction"] == row["label"] for row in found)
    assert right / len(found) == _result(tmp_path / "run")["test"]["accuracy"]


def test_order_company_and_parts_of_the_rows_change_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _answers(capsys, runs / "table", runs / "people-test.csv")
    rows = list(csv.DictReader(io.StringIO((runs / "people-test.csv").read_text())))
    shuffled = ["note,flag,gain,job,age", *(f"x,{r['flag']},{r['gain']},{r['job']},{r['age']}" for r in rows)]
    other = write(tmp_path / "other.csv", "\n".join(shuffled) + "\n")
    monkeypatch.setattr(predicting, "ROWS_AT_ONCE", 7)
    after = _answers(capsys, runs / "table", other)
    assert list(after[0]) == ["prediction", "probability of no", "probability of yes"]
    assert [row["prediction"] for row in after] == [row["prediction"] for row in before]
    shares = [[float(row["probability of yes"]) for row in found] for found in (before, after)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)


def test_a_file_without_header_and_one_of_another_form_are_read(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _answers(capsys, runs / "table", runs / "people-test.csv")
    body = (runs / "people-test.csv").read_text().partition("\n")[2]
    bare = write(tmp_path / "bare.csv", body)
    assert _answers(capsys, runs / "table", bare, "--columns", HEADER) == before
    piped = write(tmp_path / "piped.txt", f"{HEADER}\n{body}".replace(",", "|"))
    schema = write(tmp_path / "form.toml", 'delimiter = "|"\n')
    assert _answers(capsys, runs / "table", piped, "--schema", schema) == before
    schema = write(tmp_path / "other.toml", 'delimiter = "|"\nmissing = ["-"]\n')
    must_refuse(tmp_path, capsys, "predict", runs / "table", piped, "--schema", schema)


def test_what_predict_writes_is_what_calibrate_reads(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.csv"
    code, told, _ = run_program(capsys, "predict", runs / "cooled", runs / "people-test.csv", "--out", out, "--json")
    assert code == 0
    test = _result(runs / "cooled")["test"]
    assert json.loads(told)["rows"] == test["examples"]
    code, record, err = run_program(capsys, "calibrate", out, "--json")
    assert code == 0, err
    for name in ("accuracy", "nll", "ece"):
        assert json.loads(record)[name] == pytest.approx(test[name], abs=1e-5)


def test_the_recipe_gives_the_same_answers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/recipes.md, "Using the trained model"."""
    release, file = runs / "text" / "release", runs / "texts-test.tsv"
    model = rebuild(_result(runs / "text")["model"])
    load_model(model, release / "model.safetensors")
    recorded = read_recorded(json.loads((release / "schema.json").read_text()), where=release)
    rows = recorded.read(file, schema=Schema(), columns=None)
    features = rows.features(0, rows.count)
    examples = Examples(features=features, targets=features.new_zeros(len(features)).long())
    inputs, _ = examples.batch(range(rows.count))
    with torch.no_grad():
        shares = model(inputs).softmax(1)[:, 1].tolist()
    told = [float(row["probability of spam"]) for row in _answers(capsys, runs / "text", file)]
    assert told == pytest.approx(shares, rel=1e-4)


def test_only_what_is_released_is_opened(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "cooled" / "release", tmp_path / "shared" / "release")
    rows = runs / "people-test.csv"
    assert _answers(capsys, tmp_path / "shared", rows) == _answers(capsys, runs / "cooled", rows)


# Encodings: the record of a run makes the very encoder that training used.


def _again(record: object) -> dict:
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("schema", ["", SCHEMA, 'missing = ["old"]'])
def test_a_table_is_encoded_again_bit_by_bit(tmp_path: Path, schema: str) -> None:
    path = write(tmp_path / "people.csv", "\n".join([HEADER, *ROWS[:-1], *([] if "min" in schema else ROWS[-1:])]))
    facts = read_schema(write(tmp_path / "schema.toml", schema))
    prepared = prepare(open_source(path, target="label", schema=facts))
    recorded = read_recorded(_again(prepared.record), where=Path("schema.json"))
    assert recorded.input == prepared.input
    assert recorded.classes.names == prepared.classes
    train, test = read_records(path, schema=facts, columns=None).split()
    for records, examples in ((train, prepared.train), (test, prepared.test)):
        assert torch.equal(recorded.encoding.encode(records), examples.features)


@pytest.mark.parametrize("units", list(TextUnits))
def test_texts_are_encoded_again_bit_by_bit(tmp_path: Path, units: TextUnits) -> None:
    lines = [f"{'yes' if i % 2 else 'no'}\tWord {i} and nächste words, {i * 17}!" for i in range(80)]
    path = write(tmp_path / "texts.tsv", "\n".join(["label\ttext", *lines]) + "\n")
    prepared = prepare(open_source(path, target="label", classes=("no", "yes"), text_units=units))
    recorded = read_recorded(_again(prepared.record), where=Path("schema.json"))
    assert recorded.input == prepared.input
    train, _ = read_records(path, schema=Schema(), columns=None).split()
    rows = recorded.read(write(tmp_path / "train.tsv", _tsv(train)), schema=Schema(), columns=None)
    assert torch.equal(rows.features(0, rows.count), prepared.train.features)


def _tsv(records: Records) -> str:
    return "\n".join("\t".join(row) for row in ([*records.names], *records.rows)) + "\n"


@pytest.mark.parametrize(
    "encoding",
    [
        NumberEncoding(low=0.1, high=1 / 3),
        NumberEncoding(low=-2.0, high=5.0, knots=((-2.0, 0.0), (0.3, 0.1 + 0.2), (5.0, 1.0))),
        CategoryEncoding(names=("b", "a", "", "é")),
        ClassList(names=("no", "yes"), public=False),
    ],
)
def test_a_record_makes_the_same_encoding(encoding: NumberEncoding | CategoryEncoding | ClassList) -> None:
    assert type(encoding).from_json(_again(encoding.to_json())) == encoding


def test_what_the_schema_does_not_know_is_encoded_as_training_did(tmp_path: Path) -> None:
    encoding = TableEncoding(
        columns={
            "age": (NumberEncoding(low=0.0, high=100.0),),
            "job": (CategoryEncoding(names=("clerk", "smith")),),
            "gone": (),
        },
        missing=frozenset({"", "?"}),
    )
    rows = [["50", "diver"], ["?", ""], ["old", "clerk"], ["1e9", "smith"]]
    records = Records(path=tmp_path, names=("age", "job"), rows=rows, places=["line"] * 4)
    features = encoding.encode(records)
    assert features.shape == (4, encoding.input.features) == (4, 8)
    assert features[:, 4:].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert features[1:3, :4].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert features[3, :4].tolist() == [1, 1, 1, 0]
    assert encoding.unread(records) == {"age": 1}


def test_cells_that_are_no_numbers_are_counted_aloud(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "new.csv", f"age,job,gain,flag\n{CANARY},diver,0,1\n40,clerk,0,1\n")
    code, out, err = run_program(capsys, "predict", runs / "table", path)
    assert code == 0
    assert out.count("\n") == 3
    assert CANARY not in err + out
    assert "column 'age': no finite number in 1 cells that hold something; they count as missing" in err


def test_every_row_gets_an_answer_also_one_without_values(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "new.csv", "age,job,gain,flag\n30,clerk,0,1\n,,,\n\n60,smith,0,1\n")
    assert len(_answers(capsys, runs / "table", path)) == 3
    assert len(read_records(path, schema=Schema(), columns=None).rows) == 2


# Refusals: exit code 2, one line, nothing written.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        (f"{HEADER}\n", "no row after the header"),
        ("Age,job,gain,flag\n1,clerk,0,1\n", "no column 'age', which the model needs; did you mean 'Age'?"),
        ("job,flag\nclerk,1\n", "no column 'age' (and 1 more that the model takes)"),
        (f"1,clerk,0,{CANARY}\n1,smith,0,1\n", "--columns a,b,c if the file has no header"),
    ],
)
def test_rows_that_cannot_be_encoded_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    path = write(tmp_path / "new.csv", text)
    must_refuse(tmp_path, capsys, "predict", runs / "table", path)
    _, _, err = run_program(capsys, "predict", runs / "table", path)
    assert told in err
    assert CANARY not in err


def test_a_run_that_has_not_ended_is_refused(
    runs: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_iterate", interrupted)
    words = ("train", runs / "people.csv", "--target", "label", "--epsilon", 8, "--steps", 15, "--out", "run")
    assert run_program(capsys, *words)[0] == 1
    must_refuse(workplace, capsys, "predict", "run", runs / "people-test.csv")
    _, _, err = run_program(capsys, "predict", "run", runs / "people-test.csv")
    assert "has not ended" in err
    assert "--resume --out run" in err


def test_a_foreign_folder_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    rows = runs / "people-test.csv"
    for folder in (tmp_path / "empty", tmp_path / "nowhere", runs / "pictures", rows, runs / "table" / "release"):
        must_refuse(tmp_path, capsys, "predict", folder, rows)
    must_refuse(tmp_path, capsys, "predict", runs / "table", tmp_path / "nowhere.csv")
    must_refuse(tmp_path, capsys, "predict", runs / "table", tmp_path / "empty")
    must_refuse(tmp_path, capsys, "predict", runs / "images", runs / "pictures")
    must_refuse(tmp_path, capsys, "predict", runs / "images", runs / "pictures" / "t10k-labels-idx1-ubyte.gz")
    must_refuse(tmp_path, capsys, "predict", runs / "images", runs / "pictures", "--columns", "a,b")


@pytest.fixture
def damaged(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "cooled", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("schema.json", None, "only runs of `discreet train` and `discreet tune`"),
        ("schema.json", "{}", "schema.json: missing"),
        ("schema.json", "[]", "must hold one JSON object"),
        ("schema.json", '{"kind": "sound"}', "no record of an encoding"),
        ("schema.json", '{"kind": "table", "target": {"name": "a", "classes": ["b", "c"]}}', "no record"),
        ("result.json", None, "the shape of its model is not known"),
        ("result.json", '{"model": {"kind": "mlp"}}', "model record"),
        ("temperature.json", None, "must hold the same number"),
        ("temperature.json", '{"temperature": 0.0}', "must hold the same number"),
        ("model.safetensors", None, "no such file, though the run has ended"),
        ("model.safetensors", "weights", "is not the model that certificate.json names"),
    ],
)
def test_a_damaged_run_is_refused(
    runs: Path, damaged: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, told: str
) -> None:
    path = damaged / "release" / name
    path.unlink() if text is None else path.write_text(text)
    must_refuse(damaged, capsys, "predict", damaged, runs / "people-test.csv")
    assert told in run_program(capsys, "predict", damaged, runs / "people-test.csv")[2]


def test_names_of_a_foreign_schema_make_no_line_of_the_terminal(
    runs: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = damaged / "release" / "schema.json"
    record = json.loads(schema.read_text())
    record["columns"][0]["name"] = "\x1b[31m\r\nage"
    schema.write_text(json.dumps(record))
    code, _, err = run_program(capsys, "predict", damaged, runs / "people-test.csv")
    assert code == 2
    assert err.removesuffix("\n").isprintable()


def test_the_schema_of_another_run_is_refused(runs: Path, damaged: Path) -> None:
    shutil.copy(runs / "text" / "release" / "schema.json", damaged / "release" / "schema.json")
    with pytest.raises(DataError, match=r"restore both from the run"):
        read_released(damaged)


def test_weights_of_another_shape_are_refused(runs: Path, damaged: Path) -> None:
    shutil.copy(runs / "text" / "release" / "model.safetensors", damaged / "release" / "model.safetensors")
    certificate = damaged / "release" / "certificate.json"
    record = json.loads(certificate.read_text())
    del record["model_sha256"]
    certificate.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"does not hold the weights"):
        read_released(damaged)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ({}, "older version"),
        ({"range": [0, 16]}, "scikit-learn's digits"),
        ({"range": [0, 255], "channels": 3}, "a folder of image files"),
    ],
)
def test_images_that_cannot_be_read_again_are_refused_by_name(image: dict, told: str) -> None:
    record = {
        "kind": "images",
        "image": {"kind": "images", "channels": 1, "height": 6, "width": 5, **image},
        "target": {"name": "label", "classes": ["0", "1"], "source": "public"},
    }
    with pytest.raises(ConfigError, match=told):
        read_recorded(record, where=Path("schema.json"))


def test_predictions_are_not_written_where_they_do_harm(
    runs: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Path(shutil.copy(runs / "people-test.csv", damaged / "rows.csv"))
    for out in (damaged / "release" / "predictions.csv", rows, damaged, damaged / "nowhere" / "predictions.csv"):
        assert run_program(capsys, "predict", damaged, rows, "--out", out)[0] == 2
    must_refuse(damaged, capsys, "predict", damaged, rows, "--out", damaged / "release" / "predictions.csv")
    must_refuse(damaged, capsys, "predict", damaged, rows, "--json")
    assert rows.read_bytes() == (runs / "people-test.csv").read_bytes()


def test_a_model_without_noise_and_one_that_overflowed_are_said_to_be_so(
    runs: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", runs / "people.csv", "--target", "label", "--classes", "no,yes", "--steps", 15)
    assert run_program(capsys, *words, "--epsilon", "inf", "--out", "plain")[0] == 0
    code, _, err = run_program(capsys, "predict", "plain", runs / "people-test.csv")
    assert code == 0
    assert "NOT PRIVATE" in err
    assert "nothing is charged" not in err
    assert run_program(capsys, *words, "--epsilon", 8, "--learning-rate", 1e30, "--out", "burst")[0] == 0
    code, out, err = run_program(capsys, "predict", "burst", runs / "people-test.csv", "--out", "burst.csv")
    assert (code, out) == (2, "")
    assert "its weights have overflowed" in err
    assert not Path("burst.csv").exists()
