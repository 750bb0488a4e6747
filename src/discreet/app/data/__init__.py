"""From files of private data to tensors; statistics are public, or charged to the ledger. See `open_source`."""

from __future__ import annotations

from discreet.app.data.digits import digits
from discreet.app.data.opening import open_source
from discreet.app.data.schema import Schema, read_schema
from discreet.app.data.source import (
    IGNORED,
    Examples,
    ImageInput,
    InputSpec,
    Prepared,
    Preprocessing,
    Source,
    SourceKind,
    TableInput,
    Task,
    TextInput,
    input_from_json,
)
from discreet.app.data.split import PublicCalibration, SetApart, usual_share
from discreet.app.data.text import TextUnits

__all__ = [
    "IGNORED",
    "Examples",
    "ImageInput",
    "InputSpec",
    "Prepared",
    "Preprocessing",
    "PublicCalibration",
    "Schema",
    "SetApart",
    "Source",
    "SourceKind",
    "TableInput",
    "Task",
    "TextInput",
    "TextUnits",
    "digits",
    "input_from_json",
    "open_source",
    "read_schema",
    "usual_share",
]
