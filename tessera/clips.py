"""Clip files: writing of videos, animations and folders of frames, with the settings that made them.

Shapes: T frames, H W height and width, C channels (1 or 3).
"""

import html
import io
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tessera.errors import TesseraError
from tessera.files import atomic_folder, atomic_write
from tessera.images import KEY, to_pil, to_png

DEFAULT_FPS, MAX_FPS = 8.0, 1000.0  # frames per second, where neither data nor user specify any; and the most
ANIMATIONS = (".webp", ".gif", ".png")  # which Pillow writes
VIDEOS = {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9"}  # which PyAV writes, and the encoder
OPTIONS = {"libx264": {"crf": "18"}, "libvpx-vp9": {"crf": "18", "b": "0"}}
SIDE_FILE = "settings.json"  # in a folder of frames
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{}</dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def frame_rate(config: Any) -> float:
    """The frames per second of the clips of a data configuration."""
    return getattr(config, "fps", None) or DEFAULT_FPS


def check_target(path: Path, fps: float) -> None:
    """Raise TesseraError unless `save_clip` can write this file at this frame rate."""
    suffix = path.suffix.lower()
    if suffix and suffix not in (*ANIMATIONS, *VIDEOS):
        known = ", ".join((*VIDEOS, *ANIMATIONS))
        raise TesseraError(f"cannot write a clip to {path}: expected a name that ends in {known}, or a folder")
    if not 0 < fps <= MAX_FPS:
        raise TesseraError(f"fps is {fps:g}; expected more than 0 and at most {MAX_FPS:g} frames per second")
    if suffix in VIDEOS:
        _av(path)


def save_clip(
    path: Path | str, clip: np.ndarray, fps: float = DEFAULT_FPS, settings: dict[str, Any] | None = None
) -> None:
    """Write a clip uint8 [T, H, W, C], in the format of the path's suffix.

    .mp4, .mov (H.264) and .webm (VP9): yuv420p at crf 18, for people; odd sides get one more pixel. .webp and .png: a
    looping animation without loss. .gif: the same with 256 colors. No suffix: a folder of PNGs, frame-0000.png and so
    on. fps: frames per second; an animation shows each frame for a whole number of milliseconds, a GIF of hundredths of
    a second.

    settings are stored in the file: as the comment of a video or GIF, the text chunk of a PNG, or the XMP of a WebP; in
    a folder as settings.json. Raises TesseraError.
    """
    path, clip = Path(path), np.asarray(clip)
    check_target(path, fps)
    if path.suffix:
        atomic_write(path, encode_clip(clip, path.suffix, fps, settings))
    else:
        _check_clip(clip)
        _save_folder(path, clip, None if settings is None else json.dumps(settings))


def encode_clip(
    clip: np.ndarray,
    suffix: str,
    fps: float = DEFAULT_FPS,
    settings: dict[str, Any] | None = None,
    quality: int | None = None,
    threads: int | None = None,
) -> bytes:
    """A clip uint8 [T, H, W, C] as the content of a file with this suffix, as `save_clip` writes it.

    quality: of a .webp, 0 to 100; None: without loss. threads: of a video's encoder, whose bytes depend on their
    number; None: its choice. Raises TesseraError.
    """
    _check_clip(clip)
    suffix, text = suffix.lower(), None if settings is None else json.dumps(settings)
    if suffix in ANIMATIONS:
        return _animation(suffix, clip, fps, text, quality)
    return _video(suffix, clip, fps, text, threads)


def _check_clip(clip: np.ndarray) -> None:
    if clip.ndim != 4 or clip.dtype != np.uint8 or clip.shape[-1] not in (1, 3) or 0 in clip.shape:
        raise TesseraError(f"a clip is uint8 [T, H, W, 1 or 3]; got {clip.dtype} {list(clip.shape)}")


def _save_folder(path: Path, clip: np.ndarray, text: str | None) -> None:
    with atomic_folder(path) as partial:
        for number, frame in enumerate(clip):
            (partial / f"frame-{number:04d}.png").write_bytes(to_png(frame))
        if text is not None:
            (partial / SIDE_FILE).write_text(text, encoding="utf-8")


def _animation(suffix: str, clip: np.ndarray, fps: float, text: str | None, quality: int | None) -> bytes:
    options: dict[str, Any] = {"format": suffix[1:], "loop": 0, "duration": _durations(len(clip), fps, suffix)}
    if suffix == ".webp":
        options |= {"lossless": True} if quality is None else {"quality": quality}
        options |= {} if text is None else {"xmp": XMP.format(html.escape(text)).encode()}
    elif text is not None and suffix == ".gif":
        options["comment"] = text.encode()
    elif text is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(KEY, text)
    frames, buffer = [to_pil(frame) for frame in clip], io.BytesIO()
    frames[0].save(buffer, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def _durations(count: int, fps: float, suffix: str) -> list[int]:
    """Milliseconds for each frame, whose sum is that of the clip up to one unit."""
    unit = 10 if suffix == ".gif" else 1
    ends = np.arange(count + 1) * 1000 / fps / unit
    times = np.round(ends).astype(int) * unit
    times[-1] = math.ceil(round(ends[-1], 6)) * unit  # a shorter clip would be read without its last frame
    return np.maximum(np.diff(times), unit).tolist()


def _video(suffix: str, clip: np.ndarray, fps: float, text: str | None, threads: int | None) -> bytes:
    av, buffer = _av(Path(f"clip{suffix}")), io.BytesIO()
    codec, (height, width) = VIDEOS[suffix], clip.shape[1:3]
    even = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(buffer, "w", format=suffix[1:]) as container:
        if text is not None:
            container.metadata["comment"] = text
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=OPTIONS[codec])
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        if threads is not None:
            stream.codec_context.thread_count = threads
        for frame in np.repeat(even, 3 // even.shape[-1], axis=-1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise TesseraError(
            f"{path} is a video, which needs PyAV: pip install 'tessera[video]', or give a .webp or .gif"
        ) from None
    return av


def read_settings(path: Path) -> Any:
    """The settings that are stored in a clip file, or in a folder of frames; None if there are none.

    Raises OSError or ValueError if the file cannot be read.
    """
    if path.is_dir():
        file = path / SIDE_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if path.suffix.lower() in ANIMATIONS:
        text = _animation_text(path)
    else:
        av = _av(path)
        try:
            with av.open(str(path)) as container:
                metadata = {name.lower(): value for name, value in container.metadata.items()}
        except av.error.FFmpegError as error:
            raise ValueError(str(error)) from None
        text = metadata.get("comment")
    return None if text is None else json.loads(text)


def _animation_text(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            info, text = dict(image.info), getattr(image, "text", {})
    except OSError:
        raise
    except Exception as error:  # of decoders on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None
    if "xmp" in info:
        match = re.search(r"<dc:description>(.*)</dc:description>", info["xmp"].decode(errors="replace"), re.DOTALL)
        return None if match is None else html.unescape(match[1])
    comment = info.get("comment")
    return comment.decode(errors="replace") if isinstance(comment, bytes) else text.get(KEY)


def holds(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file holds exactly these settings."""
    try:
        return path.exists() and read_settings(path) == json.loads(json.dumps(settings))
    except (OSError, ValueError, TesseraError):
        return False
