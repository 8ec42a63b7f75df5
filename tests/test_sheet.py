from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from flexvar.sheet import in_rows, sheet, to_pil


def test_to_pil_maps_and_cuts_off() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert np.asarray(to_pil(image)[0])[0, :, 0].tolist() == [0, 0, 128, 255]


def test_a_sheet_holds_every_picture_and_captions_where_there_are_some() -> None:
    red, blue = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 8), "blue")
    plain = np.asarray(sheet([[red, blue], [blue]], gap=4))
    assert plain.shape == (4 + 20 + 4 + 8 + 4, 4 + 10 + 4 + 30 + 4, 3)
    assert (plain[4:24, 4:14] == (255, 0, 0)).all()
    assert (plain[28:36, 4:34] == (0, 0, 255)).all()
    named = np.asarray(sheet([[red, blue], [blue]], [["one"], []], gap=4))
    assert named.shape[0] == plain.shape[0] + 20
    assert (named[:24] != 255).any()


def test_rows() -> None:
    assert in_rows("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]
