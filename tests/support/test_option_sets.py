"""Sets of option groups: flags, files, groups and Python give the same; what cannot be meant is named."""

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest

from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.support.option_sets import OptionSet
from ddpm_pipeline.support.options import OptionGroup, at_least, option


@dataclass(frozen=True)
class SourceOptions(OptionGroup):
    title: ClassVar[str] = "source"

    source: str = option(help="Folder to read, up to 90% full.")
    limit: int | None = option(None, "Files at most.", at_least(1))


@dataclass(frozen=True)
class TargetOptions(OptionGroup):
    title: ClassVar[str] = "target"

    target: str = option("copies", "Folder to write.")
    overwrite: bool = option(True, "Replace files.")


@dataclass(frozen=True, init=False)
class CopyOptions(OptionSet):
    source: SourceOptions  # the group has the name of one of its options
    target: TargetOptions

    def check(self) -> None:
        if self.source.source == self.target.target:
            raise ConfigError("--source and --target are the same folder.")


def parse(*argv: str, **more: str) -> CopyOptions:
    return CopyOptions.parse(argv, "Copy files.", **more)


EXPECTED = {"source": "a", "limit": 3, "target": "b", "overwrite": False}


def test_flags_groups_names_and_files_give_the_same(tmp_path):
    options = CopyOptions(source="a", limit=3, target="b", overwrite=False)
    assert options.flat() == EXPECTED and options.source.limit == 3
    (tmp_path / "options.yaml").write_text(options.to_yaml())
    assert options == CopyOptions(source=SourceOptions("a", 3), target=TargetOptions("b", False))
    assert options == CopyOptions(source=SourceOptions("a"), limit=3, target=TargetOptions("b"), overwrite=False)
    assert options == CopyOptions(config=tmp_path / "options.yaml")
    assert options == parse("--source", "a", "--limit=3", "--target", "b", "--overwrite", "false")
    for no in ("--no_overwrite", "--no-overwrite"):
        assert options == parse("--source=a", "--limit=3", "--target=b", no)
    assert parse("--source=a", "--overwrite").target.overwrite
    assert options == pickle.loads(pickle.dumps(options)) and options != CopyOptions(source="a")
    assert list(CopyOptions.declared()) == list(EXPECTED)


def test_names_and_groups_override_the_file_and_flags_the_entries(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("target: from-file\nlimit: 7\n")
    assert CopyOptions(config=file, source="a", limit=2).flat() == {**EXPECTED, "limit": 2, "target": "from-file",
                                                                    "overwrite": True}  # fmt: skip
    assert CopyOptions(config=file, source=SourceOptions("a", 5)).source == SourceOptions("a", 5)
    options = parse("--source", "a", "--config", str(file), "--limit", "4", file=str(file), config="A file.")
    assert (options.source.limit, options.target.target) == (4, "from-file")


def test_other_values_of_some_options():
    options = CopyOptions(source="a")
    assert options.with_values(limit=9) == CopyOptions(source="a", limit=9)
    assert options.source.limit is None, "the original stays as it is"
    with pytest.raises(AttributeError):
        options.source = SourceOptions("b")


def test_what_cannot_be_meant_is_named(capsys):
    for message, make in {
        "--source is required": lambda: CopyOptions(target="b"),
        "--source is required: Folder to read, up to": lambda: parse("--target", "b"),
        "unknown option --sourse. Did you mean --source?": lambda: parse("--sourse", "a"),
        "unknown option --targte. Did you mean --target?": lambda: CopyOptions(source="a", targte="b"),
        "--limit 0 must be at least 1. Files at most.": lambda: parse("--source", "a", "--limit", "0"),
        "--limit '5k' must be a whole number, at least 1. Files": lambda: parse("--source", "a", "--limit", "5k"),
        "--overwrite 'maybe' must be True or False": lambda: parse("--source", "a", "--overwrite", "maybe"),
        "the same folder": lambda: parse("--source=a", "--target=a"),
    }.items():
        with pytest.raises(ConfigError) as error:
            make()
        assert message in str(error.value)
    with pytest.raises(SystemExit) as end:
        parse("--help")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "source:\n" in printed and "target:\n" in printed and "Copy files." in printed
    printed = " ".join(printed.split())
    assert "--source VALUE Folder to read, up to 90% full. Required. --limit N Files at most. target:" in printed
    assert "(default: False)" not in printed
    assert "--target VALUE Folder to write. (default: copies) --overwrite Replace" in printed
