"""Videos of a policy, as a file or in TensorBoard."""

from __future__ import annotations

import io
import itertools
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.render import REMEDY, Camera, camera
from pgsuite.errors import UserError
from pgsuite.files import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TENSORBOARD = "tensorboard"
MP4_FPS, GIF_FPS, GIF_SIZE = 60, 25, 320  # maxima; a larger GIF would be unwieldy


def open_camera(env: VectorEnv, to: str) -> Camera:
    """A camera on the first environment.  Raises UserError if it cannot be rendered, and for an invalid file name."""
    path = Path(to)
    if to != TENSORBOARD:
        if path.suffix not in (".mp4", ".gif"):
            raise UserError(f"video={to} must end in .mp4 or .gif, or be {TENSORBOARD}")
        if not path.parent.is_dir():
            raise UserError(f"video={to}: there is no directory {path.parent}")
        if path.is_dir():
            raise UserError(f"video={to} is a directory")
    try:
        if path.suffix == ".mp4":
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
        else:
            import PIL  # noqa: F401
        return camera(env)
    except ImportError as error:
        raise UserError(f"video={to} needs packages that are not here: {REMEDY} ({error})") from error
    except (ValueError, RuntimeError) as error:  # the latter from imageio-ffmpeg, where it finds no ffmpeg
        raise UserError(f"video={to}: {error}") from error


@contextmanager
def record_video(
    env: VectorEnv, to: str, show: Callable[[Gif], None], say: Callable[[str], object] = warnings.warn
) -> Iterator[Callable[[], None]]:
    """A context whose value records a frame of the first environment at each call.

    ``say`` is called with a line if all frames have the same single colour.  On success the video is written at exit:
    to the file ``to``, mp4 or GIF by its suffix, atomically; or, if ``to`` is tensorboard, it is passed to ``show``.
    Raises UserError, before any frame is recorded, if that is impossible.
    """
    path, through = Path(to), open_camera(env, to)
    every = max(1, round(through.fps / (MP4_FPS if path.suffix == ".mp4" else GIF_FPS)))
    seen, colours = itertools.count(), set[tuple[int, ...]]()

    def watch() -> None:
        if next(seen) % every == 0:
            try:
                frame = through.render()
                if len(colours) < 2:
                    colours.update(map(tuple, (frame.min((0, 1)).tolist(), frame.max((0, 1)).tolist())))
                film.add(frame)
            except ValueError as error:
                raise UserError(f"video={to}: {error}") from error
            except OSError as error:
                raise unwritable(to, error) from error

    with ExitStack() as stack:
        try:  # now rather than after the episodes
            unfinished = stack.enter_context(replacing(path)) if to != TENSORBOARD else path
        except OSError as error:
            raise unwritable(to, error) from error
        film = Mp4(unfinished, through.fps / every) if path.suffix == ".mp4" else Gif(through.fps / every)
        stack.callback(film.close)
        yield watch
        try:
            if isinstance(film, Mp4):
                film.finish()
            elif to == TENSORBOARD:
                show(film)
            else:
                unfinished.write_bytes(film.bytes())
            stack.close()  # the file takes its place
            if len(colours) == 1:
                say(f"video={to} shows nothing but the colour {next(iter(colours))}: {env.name} draws nothing here")
        except OSError as error:
            raise unwritable(to, error) from error


def unwritable(to: str, error: OSError) -> UserError:
    return UserError(f"cannot write video={to}: {error.strerror or error}")


class Mp4:
    """An H.264 encoder that streams frames to ffmpeg, cropped to even sides.  Raises OSError with ffmpeg's message."""

    def __init__(self, path: Path, fps: float) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        self.program, self.path, self.fps = get_ffmpeg_exe(), path, fps
        self.ffmpeg: subprocess.Popen[bytes] | None = None

    def add(self, frame: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if self.ffmpeg is None:
            frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:.6f}"]
            video = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "15", str(self.path)]
            command = [self.program, "-y", "-v", "error", *frames, "-i", "-", *video]
            self.ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.ffmpeg.stdin is not None
        try:
            self.ffmpeg.stdin.write(np.ascontiguousarray(frame[:height, :width]))
        except BrokenPipeError:
            self.finish()  # raises with ffmpeg's message

    def finish(self) -> None:
        if self.ffmpeg is not None:
            _, words = self.ffmpeg.communicate()
            if self.ffmpeg.returncode:
                said = words.decode(errors="replace").strip().splitlines() or ["it said nothing"]
                raise OSError(f"ffmpeg failed with code {self.ffmpeg.returncode}: {said[-1]}")

    def close(self) -> None:
        if self.ffmpeg is not None and self.ffmpeg.poll() is None:
            self.ffmpeg.kill()
            self.ffmpeg.communicate()


class Gif:
    """A GIF of small frames, each with its own palette."""

    def __init__(self, fps: float) -> None:
        from PIL import Image

        self.image, self.frames, self.fps = Image, [], fps

    def add(self, frame: np.ndarray) -> None:
        image = self.image.fromarray(np.ascontiguousarray(frame))
        image.thumbnail((GIF_SIZE, GIF_SIZE))
        self.frames.append(image.quantize(128))

    def bytes(self) -> bytes:
        # Durations are multiples of 10 ms; rounding each frame's end, not its duration, keeps the overall speed.
        ends = [10 * round(100 * i / self.fps) for i in range(len(self.frames) + 1)]
        durations = [end - start for start, end in itertools.pairwise(ends)]
        file = io.BytesIO()
        first, *rest = self.frames
        first.save(file, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        return file.getvalue()

    def close(self) -> None:
        self.frames.clear()


def log_gif(writer: SummaryWriter, film: Gif, steps: int) -> None:
    """Log a GIF as an image, which TensorBoard shows animated."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    width, height = film.frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=film.bytes())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="episode/video", image=image)]), steps)
    writer.flush()
