"""Models on the Hugging Face hub: which files to fetch, and errors that say what to do.

huggingface_hub reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, and
takes half a second for it, so it is imported only when a source is not a local path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsq.errors import DsqError, InputError

_URL = re.compile(r"(https?://)?(huggingface\.co|hf\.co)/")
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(:(?P<quant>[\w.-]+)|/(?P<file>[^:]+\.gguf))?"
)
_SHARD = re.compile(r"-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")
# Beside the weights: configs, tokenizers, templates. Subfolders hold other formats (onnx).
_SMALL = re.compile(
    r"[^/]+\.(json|jinja)|tokenizer\.model|(vocab|merges)\.txt|[^/]*chat_templates/.+"
)


@dataclass(frozen=True)
class HubId:
    """`org/name`, `org/name:quant` or `org/name/file.gguf`."""

    repo: str
    quant: str | None = None
    file: str | None = None


def resolve(source: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The local path of a model: `source` itself, or its copy in the hub's cache.

    What can only be a path (`./x`, `x.gguf`, in a folder that is here) is never asked for there.
    Downloads what is missing, unless `offline`. Raises InputError when there is no such model,
    file or revision or no right to read it, DsqError when the network or the disk fails.
    """
    if Path(source).exists():
        return Path(source)
    hub_id = parse_id(source)
    if _is_local(source):
        is_either = hub_id is not None and Path(source.split("/")[0]).is_dir()
        remedy = f"; if the hub's is meant, give https://hf.co/{source}" if is_either else ""
        raise InputError(f"{source}: no such file or directory{remedy}")
    if hub_id is None:
        raise InputError(
            f"{source}: there is no such file or directory, and a hub id is written org/name, "
            f"org/name:q4_k_m or org/name/file.gguf"
        )
    with _one_line_errors(source, hub_id.repo, revision):
        return _from_hub(hub_id, revision, offline)


def parse_id(source: str) -> HubId | None:
    """A hub id or the address of a model's page; None if `source` is neither."""
    match = _ID.fullmatch(_URL.sub("", source, count=1).rstrip("/"))
    return HubId(match["repo"], match["quant"], match["file"]) if match else None


def _is_local(source: str) -> bool:
    """Whether a name can only mean a path, so that the hub need not be asked."""
    if _URL.match(source):
        return False
    first, *rest = source.split("/")
    return (
        source.startswith((".", "/", "~"))
        or (source.endswith((".gguf", ".safetensors")) and len(rest) < 2)  # org/name/file.gguf
        or (bool(rest) and Path(first).is_dir())
    )


def _from_hub(hub_id: HubId, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import constants, model_info, snapshot_download

    if offline or constants.HF_HUB_OFFLINE:
        # Ask for no file: which ones are needed is decided by what lies in the folder.
        folder = Path(
            snapshot_download(
                hub_id.repo, revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return folder / _choose(hub_id, names).entry
    # Not list_repo_files: it tries for 24 seconds before it says that there is no network.
    listed = model_info(hub_id.repo, revision=revision, timeout=30).siblings or []
    choice = _choose(hub_id, [file.rfilename for file in listed])
    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in choice.files]
    return Path(snapshot_download(hub_id.repo, revision=revision, allow_patterns=patterns)) / (
        choice.entry
    )


@dataclass(frozen=True)
class Choice:
    """The files to fetch, and the one to open: "." for a Hugging Face directory."""

    files: tuple[str, ...]
    entry: str


def _choose(hub_id: HubId, names: Sequence[str]) -> Choice:
    """What `hub_id` means in a repository that holds `names`."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if hub_id.file is not None:
        if hub_id.file not in ggufs:
            raise InputError(f"{hub_id.repo} has no file {hub_id.file}; {_offer(hub_id, ggufs)}")
        return Choice(_with_shards(hub_id.file, ggufs), hub_id.file)
    if hub_id.quant is not None:
        found = [name for name in ggufs if _is_quant(name, hub_id.quant)]
        return _one_gguf(hub_id, found, ggufs, f"no GGUF named after {hub_id.quant}")
    weights = [
        name
        for name in names
        if re.fullmatch(r"[^/]+\.safetensors", name) and not name.startswith("consolidated")
    ]
    # .bin is a pickle, and usually the same weights again
    weights = weights or [n for n in names if re.fullmatch(r"pytorch_model[^/]*\.bin", n)]
    if not weights:
        return _one_gguf(hub_id, ggufs, ggufs, "no weights (*.safetensors, *.bin or *.gguf)")
    return Choice((*(name for name in names if _SMALL.fullmatch(name)), *weights), ".")


def _one_gguf(hub_id: HubId, found: list[str], ggufs: list[str], lacking: str) -> Choice:
    first = [n for n in found if (shard := _SHARD.search(n)) is None or int(shard["no"]) == 1]
    if not first:
        raise InputError(f"{hub_id.repo} has {lacking}; {_offer(hub_id, ggufs)}")
    if len(first) > 1:
        raise InputError(f"{hub_id.repo} has {len(first)} such GGUFs; {_offer(hub_id, first)}")
    return Choice(_with_shards(first[0], ggufs), first[0])


def _is_quant(name: str, quant: str) -> bool:
    """`Model-Q4_K_M.gguf`, `model.q4_k_m.gguf`, `Q4_K_M/model.gguf`; q4_k is not q4_k_m."""
    stem = _SHARD.sub("", name).removesuffix(".gguf")
    return re.search(rf"(^|[-._/]){re.escape(quant)}($|[-./])", stem, re.IGNORECASE) is not None


def _with_shards(name: str, ggufs: Sequence[str]) -> tuple[str, ...]:
    shard = _SHARD.search(name)
    if shard is None:
        return (name,)
    end = re.compile(re.escape(name[: shard.start()]) + rf"-\d{{5}}-of-{shard['count']}\.gguf")
    return tuple(other for other in ggufs if end.fullmatch(other))


def _offer(hub_id: HubId, ggufs: Sequence[str]) -> str:
    whole = [n for n in ggufs if (shard := _SHARD.search(n)) is None or int(shard["no"]) == 1]
    if not whole:
        return "check the name at https://huggingface.co"
    more = ", ..." if len(whole) > 8 else ""
    return "give one of " + ", ".join(f"{hub_id.repo}/{name}" for name in whole[:8]) + more


@contextmanager
def _one_line_errors(source: str, repo: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's exceptions, whose texts are paragraphs, as ours."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except DsqError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{source}: the model is gated: accept its terms at {page}, then set HF_TOKEN to a "
            f"token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{source}: there is no such path here, and no model {repo} at {constants.ENDPOINT} "
            f"(or it is private: set HF_TOKEN); check the spelling"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{source}: there is no revision {revision!r}; see {page}/tree/main for its branches "
            f"and tags"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if error.__cause__ is not None:  # it was the network after all
            raise _unreachable(source, error.__cause__) from error
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{source}: no such path here, not downloaded yet{at}, and the network is not to be "
            f"used; run once without --offline (and HF_HUB_OFFLINE)"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{source}: the hub refuses access ({status}); check that HF_TOKEN is valid and "
                f"may read {page}"
            ) from error
        raise DsqError(
            f"{source}: the hub answers {status} for {error.response.url}; try again later"
        ) from error
    # HTTPError is httpx's; which httpx depends on huggingface_hub's version
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: BaseException) -> DsqError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return DsqError(
        f"{source}: no such path here, and the download failed ({reason}); check the name, or the "
        f"network and the disk: run again to go on, or use --offline for a model that is "
        f"downloaded already"
    )
