"""What becomes of uploads: metadata goes, archives are unpacked within limits, and errors are sentences."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from geobased.cli.errors import CommandError, explain
from geobased.modeling_streetclip.image_decoding import UnreadableImageError, decode_picture
from geobased.whole_file import whole_file

from .serving import gr

# of the tab that shows each image, and of those for many
MAX_IMAGES, MAX_BATCH = 20, 256
MAX_IMAGE_BYTES, MAX_UNPACKED_BYTES = 20_000_000, 500_000_000
UPLOAD_LIMIT = "100mb"  # of one file: an archive is one
LIMITS = f"at most {MAX_BATCH} images, each of at most {MAX_IMAGE_BYTES // 1_000_000} MB; a zip of at most {UPLOAD_LIMIT[:-2]} MB"
ZIP_ENDING = ".zip"


@contextlib.contextmanager
def errors_as_messages(*files: str | None) -> Iterator[None]:
    """Within this context whatever is raised becomes a message on the page, without the server's folders of these files."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        sentence = explain(error)[0]
        for file in files:
            if file is not None:
                sentence = sentence.replace(str(Path(file).parent) + os.sep, "")
        # what is no mistake of the visitor's is of interest to who runs the server
        expected = isinstance(error, CommandError | ValueError)
        raise gr.Error(sentence, print_exception=not expected) from error


def without_metadata(files: Sequence[str] | None) -> list[str]:
    """The files, of which images now hold nothing but upright pixels, as PNG whatever their names; the others are as they were.

    They stay where they are: a visitor may have asked about them meanwhile.
    """
    for file in files or []:
        path = Path(file)
        if path.suffix.lower() != ZIP_ENDING and too_large(file) is None and not _is_plain(path):
            with contextlib.suppress(UnreadableImageError):
                _write(path, decode_picture(path))
    return list(files or [])


def _is_plain(path: Path) -> bool:
    """Whether an image holds pixels alone already."""
    try:
        with Image.open(path) as picture:
            return picture.format == "PNG" and picture.mode == "RGB" and not picture.info and not picture.getexif()
    except Exception:  # Pillow's readers each raise their own types
        return False


def _write(path: Path, picture: Image.Image) -> None:
    with whole_file(path) as temporary:
        # lossless: the model sees the pixels of the file
        picture.save(temporary, "PNG")


def without_archives(files: Sequence[str] | None) -> list[str]:
    """`without_metadata` of the files and of what archives among them hold, in place of the archives.

    Raises `CommandError` as `unpacked`.
    """
    found: list[str] = []
    for file in files or []:
        members = without_metadata(unpacked([file]))
        if members != [file]:
            # no metadata is left in it either
            with whole_file(Path(file)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                for number, member in enumerate(members):
                    archive.write(member, f"{number}/{Path(member).name}")
        found += members
    return found


def unpacked(files: Sequence[str] | None) -> list[str]:
    """Files with archives replaced by what they hold, without folders and hidden files.

    Raises `CommandError` for archives that cannot be read, hold more than `MAX_BATCH` files, or unpack to too much.
    """
    found: list[str] = []
    room = MAX_UNPACKED_BYTES
    for file in files or []:
        if not file.lower().endswith(ZIP_ENDING):
            found.append(file)
            continue
        members = _unpack(Path(file), room)
        room -= sum(os.stat(member).st_size for member in members)
        found += members
        if len(found) > MAX_BATCH:
            raise CommandError(f"{len(found):,} files are too many: at most {MAX_BATCH:,} at a time")
    return found


def _unpack(path: Path, room: int) -> list[str]:
    """What an archive holds, if that takes no more than so many bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir() and not _hidden(member.filename)]
            if len(members) > MAX_BATCH:
                raise CommandError(f"{path.name} holds {len(members):,} files: at most {MAX_BATCH:,} at a time")
            files = []
            for member in members:
                # the archive's own word on sizes is not to be trusted
                with archive.open(member) as source:
                    data = source.read(min(MAX_IMAGE_BYTES, room) + 1)
                room -= len(data)
                if room < 0:
                    raise CommandError(f"{path.name} unpacks to more than {MAX_UNPACKED_BYTES // 1_000_000:,} MB: split it")
                # a folder of its own: names in different folders may be equal
                target = Path(tempfile.mkdtemp(prefix="zip-", dir=path.parent)) / PurePosixPath(member.filename).name
                target.write_bytes(data)
                files.append(str(target))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise CommandError(f"{path.name} is no zip archive that can be read: {error}") from error
    if not files:
        raise CommandError(f"{path.name} holds no files")
    return files


def _hidden(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return not parts or any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts)


def checked(files: Sequence[str] | None, most: int, hint: str = "") -> list[str]:
    """The files. Raises `CommandError` for none, and for more than `most`."""
    if not files:
        raise CommandError("there are no images: choose some first")
    if len(files) > most:
        raise CommandError(f"{len(files):,} images are too many: at most {most:,} at a time{hint}")
    return list(files)


def too_large(file: str) -> str | None:
    """Why a file is not opened, if it is too large."""
    size = os.stat(file).st_size
    if size <= MAX_IMAGE_BYTES:
        return None
    return f"{Path(file).name} is larger than {MAX_IMAGE_BYTES // 1_000_000} MB: scale it down first"


__all__ = [
    "LIMITS",
    "MAX_BATCH",
    "MAX_IMAGES",
    "UPLOAD_LIMIT",
    "checked",
    "errors_as_messages",
    "too_large",
    "unpacked",
    "without_archives",
    "without_metadata",
]
