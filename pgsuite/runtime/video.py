"""Moving pictures of a policy, as a file or in TensorBoard."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.render import REMEDY, camera
from pgsuite.runtime.schema import UserError

TENSORBOARD = "tensorboard"
MP4_FPS, GIF_FPS, GIF_SIZE = 60, 25, 320  # at most: a GIF of more is too large to look at


@contextmanager
def filming(env: VectorEnv, to: str, run: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Something to call whenever the first environment is to be seen.

    What it saw is written when all is well at the end: to the file ``to``, mp4 or GIF by its suffix, which is whole or
    not there at all; or, if ``to`` is tensorboard, among the images of a run, at a number of steps.  Raises UserError,
    before anything is filmed, where that cannot be.
    """
    path = Path(to)
    if to != TENSORBOARD and path.suffix not in (".mp4", ".gif"):
        raise UserError(f"video={to} must end in .mp4 or .gif, or be {TENSORBOARD}")
    if not path.parent.is_dir():
        raise UserError(f"video={to}: there is no directory {path.parent}")
    try:
        lens = camera(env)
        every = max(1, round(lens.fps / (MP4_FPS if path.suffix == ".mp4" else GIF_FPS)))
        film = Mp4(path, lens.fps / every) if path.suffix == ".mp4" else Gif(lens.fps / every)
    except ImportError as error:
        raise UserError(f"video={to} needs packages that are not here: {REMEDY} ({error})") from error
    except ValueError as error:
        raise UserError(f"video={to}: {error}") from error
    seen = itertools.count()

    def watch() -> None:
        if next(seen) % every == 0:
            try:
                film.add(lens.shoot())
            except ValueError as error:
                raise UserError(f"video={to}: {error}") from error

    try:
        yield watch
        if isinstance(film, Mp4):
            film.finish()
        elif to == TENSORBOARD:
            log_gif(run, film, steps)
        else:
            replace(path, film.bytes())
    except OSError as error:
        raise UserError(f"cannot write video={to}: {error.strerror or error}") from error
    finally:
        film.close()


def partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.writing{path.suffix}")


def replace(path: Path, content: bytes) -> None:
    partial(path).write_bytes(content)
    partial(path).replace(path)


class Mp4:
    """H.264, written as it comes; even sides, as it wants them."""

    def __init__(self, path: Path, fps: float) -> None:
        import imageio_ffmpeg

        self.ffmpeg, self.path, self.fps = imageio_ffmpeg, path, fps
        self.writer: Any = None
        partial(path).touch()  # now, rather than after minutes of playing

    def add(self, frame: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if self.writer is None:
            self.writer = self.ffmpeg.write_frames(
                str(partial(self.path)), (width, height), fps=self.fps, macro_block_size=2, quality=7
            )
            self.writer.send(None)
        self.writer.send(np.ascontiguousarray(frame[:height, :width]))

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()
            partial(self.path).replace(self.path)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        partial(self.path).unlink(missing_ok=True)


class Gif:
    """Small frames, each in a palette of its own."""

    def __init__(self, fps: float) -> None:
        from PIL import Image

        self.image, self.frames = Image, []
        self.milliseconds = round(100 / fps) * 10  # it knows hundredths of a second

    def add(self, frame: np.ndarray) -> None:
        image = self.image.fromarray(np.ascontiguousarray(frame))
        image.thumbnail((GIF_SIZE, GIF_SIZE))
        self.frames.append(image.quantize(128))

    def bytes(self) -> bytes:
        file = io.BytesIO()
        first, *rest = self.frames
        first.save(file, "GIF", save_all=True, append_images=rest, duration=self.milliseconds, loop=0)
        return file.getvalue()

    def close(self) -> None:
        self.frames.clear()


def log_gif(run: Path, film: Gif, steps: int) -> None:
    """TensorBoard shows an image as it is given, and a GIF moves."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from torch.utils.tensorboard.writer import SummaryWriter

    width, height = film.frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=film.bytes())
    writer = SummaryWriter(str(run))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="episode/video", image=image)]), steps)
    writer.close()
