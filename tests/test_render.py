"""What a video shows is what happened, and what cannot be shown is said before anything is played."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from test_cli import TINY, Cli, command, finished, own_run  # noqa: F401
from toys import PointMass

from pgsuite.envs import Gym, make
from pgsuite.envs import render as drawing
from pgsuite.envs.render import Camera, camera, choose_gl, drawn, picture
from pgsuite.envs.tasks.mujoco import ASSETS, unwarned
from pgsuite.errors import UserError
from pgsuite.testing import random_actions
from pgsuite.training import video as filming
from pgsuite.training.video import Gif, record_video

pytest.importorskip("pygame", reason="needs the video extra")


@pytest.fixture
def gl() -> None:
    try:
        choose_gl()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("gl")
@pytest.mark.parametrize("backend", ["mujoco", pytest.param("warp", marks=pytest.mark.long)])
def test_a_robot_is_drawn_as_gymnasium_draws_it_where_it_stands(backend: str) -> None:
    env: Any = make("HalfCheetah", 2, dtype=torch.float64, backend=backend)
    with unwarned():
        other: Any = gymnasium.make("HalfCheetah-v5", render_mode="rgb_array", camera_name="track").unwrapped
    env.reset()
    other.set_state(env.task.physics.qpos[0].numpy(), env.task.physics.qvel[0].numpy())
    open_camera, frames = camera(env), []
    for action in random_actions(env, 5):
        mujoco.mj_forward(other.model, other.data)  # a step leaves what is drawn one substep behind
        frames.append((open_camera.render().astype(int), other.render().astype(int)))
        env.step(action)
        other.step(action[0].numpy())
    assert open_camera.fps == pytest.approx(20)
    for ours, theirs in frames:
        assert ours.shape == (480, 480, 3) and np.abs(ours - theirs).mean() < 0.05
    assert np.abs(frames[0][0] - frames[-1][0]).mean() > 1


@pytest.mark.usefixtures("gl")
def test_the_floor_goes_along() -> None:
    """gymnasium's ends 40 m from the start, and a good cheetah runs 200 m."""
    env: Any = make("HalfCheetah", 1)
    env.reset()
    open_camera, frames = camera(env), []
    for x in (0.0, 100.0, 100.7):
        env.task.physics.qpos[0, 0] = x
        frames.append(open_camera.render().astype(int))
    begun, far, farther = frames
    assert np.abs(far - begun).mean() < 3 < np.abs(farther - begun).mean()  # but for the shadow; half a pattern on


@pytest.mark.usefixtures("gl")
@pytest.mark.parametrize("name", ["Ant", "InvertedPendulum", "Reacher"])
def test_every_robot_is_seen_from_where_gymnasium_looks(name: str) -> None:
    env: Any = make(name, 1)
    env.reset()
    ours = camera(env).render()
    options: dict[str, Any] = {"camera_name": "track"} if name == "Ant" else {}
    other: Any = gymnasium.make(f"{name}-v5", render_mode="rgb_array", **options).unwrapped
    other.set_state(env.task.physics.qpos[0].numpy(), env.task.physics.qvel[0].numpy())
    assert ours.std() > 1 and np.array_equal(ours, other.render())
    other.close()


@pytest.mark.usefixtures("gl")
def test_a_model_of_ones_own_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where one stands, and with a smaller buffer than a picture needs."""
    monkeypatch.chdir(tmp_path)
    xml = (ASSETS / "half_cheetah.xml").read_text()
    small = '<visual><global offwidth="100" offheight="100"/></visual><worldbody>'
    Path("my.xml").write_text(xml.replace("<worldbody>", small))
    mine, gymnasiums = (
        camera(make("HalfCheetah", 1, xml_file=file)).render() for file in ("my.xml", "half_cheetah.xml")
    )
    assert np.array_equal(mine, gymnasiums)


@pytest.mark.usefixtures("gl")
def test_a_camera_that_goes_leaves_the_others_alone() -> None:
    first, second = (camera(make(name, 1)) for name in ("HalfCheetah", "Ant"))
    before = second.render()
    del first
    gc.collect()
    assert before.std() > 1 and np.array_equal(second.render(), before)


@pytest.mark.long
@pytest.mark.usefixtures("gl")
def test_gymnasiums_robots_draw_themselves_without_a_screen() -> None:
    """In a process where nothing has chosen how."""
    code = """
from pgsuite.envs import Gym, make
from pgsuite.envs.render import camera
env = make(Gym(id="Reacher-v5", options={"render_mode": "rgb_array"}), 2)
env.reset()
assert camera(env).render().std() > 1
"""
    bare = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["CartPole", "Pendulum", "Acrobot", "MountainCar", "MountainCarContinuous"])
def test_classic_control_is_drawn_as_gymnasium_draws_it(name: str) -> None:
    env: Any = make(name, 2, dtype=torch.float64)
    other: Any = gymnasium.make(env.task.gymnasium_id, render_mode="rgb_array").unwrapped
    other.reset(seed=1)
    env.task.state[0] = torch.as_tensor(np.asarray(other.state, np.float64))
    assert np.array_equal(camera(env).render(), other.render())


def test_a_gymnasium_environment_draws_itself() -> None:
    env: Any = make(Gym(id="CartPole-v1", options={"render_mode": "rgb_array"}), 2)
    env.reset()
    assert np.array_equal(camera(env).render(), env.vec.envs[0].render())


def test_what_observes_images_is_seen_as_it_sees() -> None:
    stack = np.zeros((4, 5, 6), np.uint8)
    stack[3, 1, 2] = 200
    drawn = picture(stack)
    assert drawn.shape == (20, 24, 3) and (drawn[4:8, 8:12] == 200).all() and drawn.sum() == 200 * 16 * 3
    colours = np.zeros((3, 5, 6), np.uint8)
    colours[0] = 9
    assert (picture(colours)[..., 0] == 9).all() and not picture(colours)[..., 1:].any()


def frames_of(path: Path) -> tuple[int, tuple[int, int], float]:
    """Number of frames, size, and seconds."""
    if path.suffix == ".mp4":
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(str(path))
        meta = next(reader)
        return len(list(reader)), meta["size"], meta["duration"]
    from PIL import Image

    film, seconds = Image.open(path), 0.0
    for i in range(film.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
        film.seek(i)
        seconds += film.info["duration"] / 1000
    return film.n_frames, film.size, seconds  # pyright: ignore[reportAttributeAccessIssue]


def test_evaluation_films_its_first_episode_and_plays_as_without(command: Cli) -> None:  # noqa: F811
    """60 steps of Pendulum take gymnasium's 2 seconds."""
    assert command("train", "env=Pendulum", "env.max_episode_steps=60", "hydra.run.dir=run", *TINY)[0] == 0
    assert command("evaluate", "run=run", "episodes=3")[0] == 0
    plain = json.loads((command.folder / "run" / "evaluation.json").read_text())
    for name in ("film.mp4", "film.gif"):
        code, out, err = command("evaluate", "run=run", "episodes=3", f"video={name}")
        assert code == 0, err
        assert out.strip().splitlines()[-1].endswith(f"film in {name}") and "nothing but" not in out
        assert json.loads((command.folder / "run" / "evaluation.json").read_text()) == plain
        count, size, seconds = frames_of(command.folder / name)
        assert size == {"film.mp4": (500, 500), "film.gif": (320, 320)}[name]
        assert seconds == pytest.approx(2, abs=0.1) and count > 50
    assert sorted(path.name for path in command.folder.iterdir()) == ["film.gif", "film.mp4", "run"]


@pytest.mark.long
def test_a_film_in_tensorboard_moves(command: Cli) -> None:  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = ["env=gym", "env.id=CartPole-v1", "env.workers=2", "env.max_episode_steps=20"]
    assert command("train", *own, "hydra.run.dir=run", *TINY)[0] == 0
    code, _, err = command("evaluate", "run=run", "episodes=2", "video=tensorboard")
    assert code == 0, err
    events = EventAccumulator(str(command.folder / "run"))
    events.Reload()
    (image,) = events.Images("episode/video")
    assert image.step == 1024 and image.encoded_image_string.startswith(b"GIF89a")
    (command.folder / "x.gif").write_bytes(image.encoded_image_string)
    assert frames_of(command.folder / "x.gif")[0] > 5


def test_what_cannot_be_written_is_said_before_anything_is_filmed(tmp_path: Path) -> None:
    (tmp_path / "taken.gif").mkdir()
    for name in ("film.mp4", "film.gif"):
        (tmp_path / f".{name.replace('.', f'.{os.getpid()}.writing.')}").mkdir()  # root may write everywhere else
    env = make("CartPole", 1)
    for name, message in (("taken.gif", "is a directory"), ("film.mp4", "cannot write"), ("film.gif", "cannot write")):
        with pytest.raises(UserError, match=message), record_video(env, str(tmp_path / name), lambda film: None):
            pytest.fail(f"{name} was to be filmed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_a_film_that_does_not_fit_on_the_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    env = make("CartPole", 1)
    with (
        pytest.raises(UserError, match=r"cannot write video=.*film\.mp4: ffmpeg failed"),
        record_video(env, str(tmp_path / "film.mp4"), lambda film: None) as watch,
    ):
        (unfinished,) = tmp_path.iterdir()
        unfinished.unlink()
        unfinished.symlink_to("/dev/full")
        watch()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_film_that_is_interrupted_leaves_the_one_before(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("before")
    with (
        pytest.raises(KeyboardInterrupt),
        record_video(make("CartPole", 1), str(tmp_path / name), lambda film: None) as watch,
    ):
        watch()
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("fps", [66.7 / 3, 30, 125 / 5])
def test_a_gif_keeps_time_although_it_knows_only_hundredths_of_a_second(tmp_path: Path, fps: float) -> None:
    film = Gif(fps)
    for i in range(60):
        film.add(np.full((8, 8, 3), 4 * i, np.uint8))
    (tmp_path / "x.gif").write_bytes(film.bytes())
    assert frames_of(tmp_path / "x.gif")[2] == pytest.approx(60 / fps, abs=0.01)


def test_a_wrong_video_is_refused_before_anything_is_played(command: Cli, own_run: Path) -> None:  # noqa: F811
    for video, message in (
        ("film.avi", "video=film.avi must end in .mp4 or .gif, or be tensorboard"),
        ("nowhere/film.mp4", "there is no directory nowhere"),
        ("", "video= must end in .mp4 or .gif"),
    ):
        code, _, err = command("evaluate", "run=run", f"video={video}")
        assert code == 1 and message in err and err.strip().count("\n") == 0
        assert not (own_run / "evaluation.json").exists()


@pytest.mark.usefixtures("own_run")
def test_missing_packages_are_named(command: Cli) -> None:  # noqa: F811
    for package in ("imageio_ffmpeg", "pygame"):
        with command.monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            code, _, err = command("evaluate", "run=run", "video=film.mp4")
        assert code == 1 and "needs packages that are not here: pip install -e '.[video]'" in err
    assert not (command.folder / "film.mp4").exists()


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ValueError, match="toy cannot be drawn"):
        camera(PointMass(2))
    with pytest.raises(ValueError, match="CartPole-v1 cannot be drawn: it neither renders rgb_array in this process"):
        camera(make(Gym(id="CartPole-v1"), 2))


@pytest.mark.parametrize("empty", [True, False])
def test_a_film_of_one_colour_is_warned_of(empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[1, 0, 0, 2] = 0 if empty else 9
    film, said = iter(frames), []
    monkeypatch.setattr(filming, "camera", lambda env: Camera(lambda: next(film), 30))
    with record_video(make("CartPole", 1), str(tmp_path / "x.gif"), lambda gif: None, said.append) as watch:
        watch()
        watch()
    assert len(said) == empty and (not empty or "shows nothing but the colour (0, 0, 0): CartPole" in said[0])


@pytest.mark.long
def test_films_are_drawn_offscreen() -> None:
    """In a process without a screen, where nothing has chosen how."""
    code = """
import pygame
from pgsuite.envs import make
from pgsuite.envs.render import camera
camera(make("CartPole", 1)).render()
pygame.display.init()
assert pygame.display.get_driver() == "offscreen", pygame.display.get_driver()
"""
    bare = {k: v for k, v in os.environ.items() if k not in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transparency_is_left_out_of_a_picture() -> None:
    frame = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(drawn("x", lambda: frame), frame[..., :3])


def complain() -> None:
    raise KeyError("no paint")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (complain, "x cannot be drawn: KeyError: 'no paint'"),
        (lambda: None, "x cannot be drawn: its render() gives NoneType and not bytes [H, W, 3]"),
        (lambda: np.zeros((2, 2)), "x cannot be drawn: its render() gives float64 (2, 2) and not bytes"),
    ],
)
def test_drawing_that_fails_is_said(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        drawn("x", draw)


def test_an_environment_that_draws_nothing_is_refused_in_one_message(command: Cli) -> None:  # noqa: F811
    faulty = ["env=gym", "env.id=Faulty-v0", "env.import=test_gym_env", "env.max_episode_steps=9"]
    assert command("train", *faulty, "hydra.run.dir=run", *TINY)[0] == 0
    code, _, err = command("evaluate", "run=run", "video=film.mp4")
    assert code == 1 and err.strip().count("\n") == 0
    assert "error: video=film.mp4: Faulty-v0 cannot be drawn: it neither renders rgb_array" in err


def test_a_gl_that_is_named_and_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLFW without a screen makes a context all the same."""
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="MuJoCo cannot draw here with MUJOCO_GL=glfw: install libegl1, libegl-mesa0"):
        choose_gl.__wrapped__()


def test_osmesa_is_next_after_egl_and_the_packages_are_named_where_neither_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works: set[str] = {"osmesa"}

    def run(arguments: list[str], **_: Any) -> Any:
        return SimpleNamespace(returncode=int(not any(f"mujoco.{name} " in arguments[2] for name in works)))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(drawing.sys, "platform", "linux")
    monkeypatch.setattr(drawing.importlib, "reload", lambda module: module)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    drawing.choose_gl.__wrapped__()
    assert drawing.os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    works.clear()
    with pytest.raises(ValueError, match=r"any of egl, osmesa: install libegl1, .* or libosmesa6 for MUJOCO_GL=osmesa"):
        drawing.choose_gl.__wrapped__()


class Nested(gymnasium.Env[Any, Any]):
    """Draws by MuJoCo in a part of its own, as mazes with a robot in them do."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.part = gymnasium.make("InvertedPendulum-v5", render_mode=render_mode)
        self.observation_space, self.action_space = self.part.observation_space, self.part.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.part.reset(seed=seed)

    def step(self, action: Any) -> Any:
        return self.part.step(action)

    def render(self) -> Any:
        return self.part.render()


gymnasium.register("Nested-v0", Nested)  # pyright: ignore[reportArgumentType]


def test_mujocos_back_end_is_chosen_for_whatever_part_of_an_environment_draws_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(drawing, "choose_gl", lambda: chosen.append("chosen"))
    env = make(Gym(id="Nested-v0", options={"render_mode": "rgb_array"}), 1)
    camera(env)
    assert chosen
