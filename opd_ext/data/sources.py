# SPDX-License-Identifier: Apache-2.0
"""Where the files of a data set come from: a file or folder of the user's, or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from opd_ext.data.published import Origin, Published, Split
from opd_ext.data.reading import FORMATS, kind_of


def matching_splits(published: Published, splits: Sequence[Split], source: Path) -> list[Split]:
    """The splits that a single local file holds: those whose name it bears, or all where one file makes them all.

    Raises:
        ValueError: the file may be any of several splits.
    """
    if source.is_dir() or len({split.origins for split in published.splits}) == 1:
        return list(splits)
    name = _name(source)
    found = [split for split in splits if all(origin.is_called(name) for origin in split.origins)]
    if not found and len(splits) > 1:
        names = " or ".join(split.name for split in splits)
        raise ValueError(f"{source} bears the name of no split of {published.name}: say which it is, --split {names}.")
    return found or list(splits)


def files_of(published: Published, split: Split, origin: Origin, source: Path | None) -> Iterator[tuple[str, Path]]:
    """Files of an origin, by name and where they lie; from the hub each is fetched when it is asked for.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    if source is None:
        yield from _from_hub(published, origin)
        return
    if source.is_file():
        if len(split.origins) > 1:
            raise ValueError(
                f"{published.name} is made of {len(split.origins)} files, so --from must be a folder with them: "
                f"{' and '.join(origin.address for origin in split.origins)}."
            )
        yield source.name, source
        return
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist.")
    there = sorted(path for path in source.rglob("*") if path.is_file() and kind_of(path))
    found = [path for path in there if origin.is_called(_name(path))]
    if not found and len(there) == 1 and len(split.origins) == 1:
        found = there
    if not found:
        patterns = " or ".join(origin.local or origin.files)
        listed = (
            f"it has {', '.join(path.name for path in there[:5])}" if there else f"it has no .{', .'.join(FORMATS)}"
        )
        raise FileNotFoundError(
            f"{source} has no file of {published.name}'s {split.name} ({patterns}): {listed}; name the file itself."
        )
    for path in found:
        yield str(path.relative_to(source)), path


def _name(path: Path) -> str:
    return f"{path.absolute().parent.name}/{path.name}"


def _from_hub(published: Published, origin: Origin) -> Iterator[tuple[str, Path]]:
    if not origin.on_hub:
        raise ValueError(f"{published.name} is not on the hub: get {origin.address} and name its folder with --from.")
    from huggingface_hub import HfApi, hf_hub_download

    revision = origin.revision or None
    try:
        listed = HfApi().list_repo_files(origin.repository, repo_type="dataset", revision=revision)
    except Exception as error:  # the hub's client and what it stands on raise what they like
        yield from _from_cache(published, origin, error)
        return
    names = sorted(name for name in listed if any(fnmatchcase(name, pattern) for pattern in origin.files))
    if not names:
        raise ValueError(f"{origin.address} has no file {' or '.join(origin.files)} any more: name one with --from.")
    for name in names:
        try:
            path = hf_hub_download(origin.repository, name, repo_type="dataset", revision=revision)
        except Exception as error:
            raise _not_had(published, origin, error) from None
        yield name, Path(path)


def _from_cache(published: Published, origin: Origin, error: Exception) -> Iterator[tuple[str, Path]]:
    """What the hub's cache on this machine has, for nodes without a network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                origin.repository,
                repo_type="dataset",
                revision=origin.revision or None,
                allow_patterns=list(origin.files),
                local_files_only=True,
            )
        )
    except Exception:
        raise _not_had(published, origin, error) from None
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in origin.files)]
    if not found:
        raise _not_had(published, origin, error)
    for name in found:
        yield name, folder / name


def _not_had(published: Published, origin: Origin, error: Exception) -> ValueError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    gated = status in (401, 403) or type(error).__name__ == "GatedRepoError"
    why = "it wants a login and its terms accepted" if gated else type(error).__name__
    return ValueError(
        f"{published.name} cannot be had from the hub ({why}): get {' and '.join(origin.files)} of {origin.address} "
        "another way and name the file or its folder with --from."
    )
