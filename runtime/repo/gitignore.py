"""What .gitignore files say, as git reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


@dataclass(frozen=True)
class Ignores:
    """The .gitignore files from the repository's root down to a folder."""

    specs: tuple[tuple[Path, GitIgnoreSpec], ...] = ()

    def with_folder(self, folder: Path) -> Ignores:
        lines = _ignore_lines(folder / ".gitignore")
        if (folder / ".git").is_dir():
            lines = [*_ignore_lines(folder / ".git" / "info" / "exclude"), *lines]
        if not lines:
            return self
        from pathspec import GitIgnoreSpec

        try:
            spec = GitIgnoreSpec.from_lines(lines)
        except ValueError:  # one bad pattern: git ignores that line alone
            spec = GitIgnoreSpec.from_lines([line for line in lines if _is_pattern(line)])
        return Ignores((*self.specs, (folder, spec)))

    def match(self, path: Path, *, is_folder: bool) -> bool:
        """The innermost file that says anything about `path` decides, as in git."""
        for base, spec in reversed(self.specs):
            name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
            said = spec.check_file(name).include
            if said is not None:
                return said
        return False


def _is_pattern(line: str) -> bool:
    from pathspec import GitIgnoreSpec

    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def _ignore_lines(path: Path) -> list[str]:
    try:
        if not path.is_file():
            return []
        return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []


def ignores_above(root: Path) -> Ignores:
    """What the folders above `root` say, when it lies inside a repository.

    Nothing when they ignore `root` itself: whoever names an ignored folder wants it.
    """
    if (root / ".git").exists():
        return Ignores()
    above = []
    for folder in root.parents:
        above.append(folder)
        if (folder / ".git").exists():
            break
    else:
        return Ignores()
    ignores = Ignores()
    for folder in reversed(above):
        ignores = ignores.with_folder(folder)
    inside = [root, *above[:-1]]
    return Ignores() if any(ignores.match(f, is_folder=True) for f in inside) else ignores
