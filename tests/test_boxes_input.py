"""Bad input to `Boxes`: every refusal names the argument, what was expected and what came."""

import re

import pytest
import torch

import debiaskd as dk

Boxes = dk.Boxes
c, o = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32), torch.tensor([0, 1])
good = Boxes.from_lists([[[0, 0, 4, 3], [2, 1, 5, 6]], [], None, [[1, 1, 2, 2]]], [[7, 3], [], None, [3]])
plain = Boxes.from_lists([[], [], [], []])
BAD = [
    (lambda: Boxes([[0, 0, 2, 2]], o), TypeError, "coords must be a torch.Tensor, got list"),
    (lambda: Boxes(c.long(), o), TypeError, "coords must be torch.int32, got torch.int64"),
    (lambda: Boxes(c.float(), o), TypeError, "coords must be torch.int32, got torch.float32"),
    (lambda: Boxes(c, [0, 1]), TypeError, "offsets must be a torch.Tensor, got list"),
    (lambda: Boxes(c, o.int()), TypeError, "offsets must be torch.int64, got torch.int32"),
    (lambda: Boxes(c[0], o), ValueError, "coords must have shape [M,4], got [4]"),
    (lambda: Boxes(c[:, :3], o), ValueError, "coords must have shape [M,4], got [1, 3]"),
    (lambda: Boxes(c, o[None]), ValueError, "offsets must have shape [N+1], got [1, 2]"),
    (lambda: Boxes(c, o[:0]), ValueError, "offsets must have shape [N+1], got [0]"),
    (
        lambda: Boxes(c, torch.tensor([1, 1])),
        ValueError,
        "offsets must rise from 0 to the number of boxes, 1, got [1, 1]",
    ),
    (
        lambda: Boxes(c, torch.tensor([0, 2])),
        ValueError,
        "offsets must rise from 0 to the number of boxes, 1, got [0, 2]",
    ),
    (lambda: Boxes(c, torch.tensor([0])), ValueError, "offsets must rise from 0 to the number of boxes, 1, got [0]"),
    (
        lambda: Boxes(c, torch.tensor([0, 2, 1])),
        ValueError,
        "offsets must rise from 0 to the number of boxes, 1, got [0, 2",
    ),
    (
        lambda: Boxes(c, torch.arange(20)),
        ValueError,
        "offsets must rise from 0 to the number of boxes, 1, got [0, 1, 2, 3,",
    ),
    (
        lambda: Boxes(c.flip(1), o),
        ValueError,
        "coords[0] must have x0 <= x1 and y0 <= y1, got [2, 2, 0, 0] (inverted box)",
    ),
    (lambda: Boxes(c, o, torch.tensor([1, 2])), ValueError, "labels must have shape [M]=[1], got [2]"),
    (lambda: Boxes(c, o, torch.tensor([1.0])), TypeError, "labels must be torch.int64, got torch.float32"),
    (lambda: Boxes(c, o, [1]), TypeError, "labels must be a torch.Tensor, got list"),
    (lambda: Boxes(c, o, None, torch.tensor([1])), TypeError, "annotated must be torch.bool, got torch.int64"),
    (lambda: Boxes(c, o, None, torch.ones(2).bool()), ValueError, "annotated must have shape [N]=[1], got [2]"),
    (lambda: Boxes(c, o.to("meta")), ValueError, "offsets must be on the device of coords, cpu, got meta"),
    (lambda: Boxes.from_lists(3), TypeError, "boxes must be a sequence, got int"),
    (lambda: Boxes.from_lists([[[1, 2, 3]]]), ValueError, "boxes[0] must have shape [k,4], got [1, 3]"),
    (lambda: Boxes.from_lists([[], [1, 2, 3, 4]]), ValueError, "boxes[1] must have shape [k,4], got [4]"),
    (
        lambda: Boxes.from_lists([[[1, 2, 3, 4], [1]]]),
        TypeError,
        "boxes[0] must be rows of four numbers, got [[1, 2, 3, 4]",
    ),
    (lambda: Boxes.from_lists([["a"]]), TypeError, "boxes[0] must be rows of four numbers, got ['a']"),
    (
        lambda: Boxes.from_lists([[[0, 0, 1.5, 2]]]),
        ValueError,
        "boxes[0] must hold whole numbers of pixels that fit into",
    ),
    (lambda: Boxes.from_lists([[[0, 0, float("nan"), 2]]]), ValueError, "boxes[0] must hold whole numbers of pixels"),
    (lambda: Boxes.from_lists([[[0, 0, float("inf"), 2]]]), ValueError, "boxes[0] must hold whole numbers of pixels"),
    (
        lambda: Boxes.from_lists([[[0, 0, 2**31, 2]]]),
        ValueError,
        "boxes[0] must hold whole numbers of pixels that fit into",
    ),
    (lambda: Boxes.from_lists([[[True] * 4]]), TypeError, "boxes[0] must hold numbers, got torch.bool"),
    (
        lambda: Boxes.from_lists([[[3, 0, 2, 2]]]),
        ValueError,
        "coords[0] must have x0 <= x1 and y0 <= y1, got [3, 0, 2, 2]",
    ),
    (lambda: Boxes.from_lists([[], []], [[]]), ValueError, "labels must have one entry an image, 2, got 1"),
    (lambda: Boxes.from_lists([[[0, 0, 1, 1]]], [[]]), ValueError, "labels[0] must have one class a box, 1, got [0]"),
    (lambda: Boxes.from_lists([[[0, 0, 1, 1]]], [[1.5]]), TypeError, "labels[0] must hold integers, got torch.float32"),
    (lambda: Boxes.from_lists([[]], 3), TypeError, "labels must be a sequence, got int"),
    (lambda: Boxes.cat([]), ValueError, "boxes must hold at least one Boxes, got an empty sequence"),
    (lambda: Boxes.cat([good, c]), TypeError, "boxes[1] must be a dk.Boxes, got Tensor"),
    (lambda: Boxes.cat([good, plain]), ValueError, "boxes must all have labels or none of them, got labels in 1 of 2"),
    (lambda: good[4], IndexError, "image 4 is out of range for boxes of 4 images"),
    (lambda: good[-5], IndexError, "image -5 is out of range for boxes of 4 images"),
    (lambda: good[[True]], ValueError, "index must have shape [N]=[4], got [1]"),
    (lambda: good[torch.tensor([0.5])], TypeError, "index must hold integers or be bool [N], got torch.float32 [1]"),
    (lambda: good[torch.tensor([[0]])], TypeError, "index must hold integers or be bool [N], got torch.int64 [1, 1]"),
    (lambda: good["a"], TypeError, "index must be an integer, a slice, integers or bool [N], got 'a'"),
    (lambda: plain.for_class(torch.zeros(4).long()), ValueError, "for_class needs boxes with labels, got labels=None"),
    (lambda: good.annotated_where(torch.ones(4)), TypeError, "where must be torch.bool, got torch.float32"),
    (lambda: good.annotated_where(torch.ones(3).bool()), ValueError, "where must have shape [N]=[4], got [3]"),
    (lambda: good.for_class([0, 0, 0, 0]), TypeError, "target must be a torch.Tensor, got list"),
    (lambda: good.for_class(torch.zeros(4)), TypeError, "target must be torch.int64, got torch.float32"),
    (lambda: good.for_class(torch.zeros(3).long()), ValueError, "target must have shape [N]=[4], got [3]"),
    (
        lambda: good.for_class(torch.zeros(4, device="meta").long()),
        ValueError,
        "target must be on the device of boxes, cpu",
    ),
    (lambda: good.dilate(-0.1, (4, 4)), ValueError, "fraction must be a finite number >= 0, got -0.1"),
    (lambda: good.dilate("much", (4, 4)), TypeError, "fraction must be a number, got str"),
    (lambda: good.dilate(0.1, 4), TypeError, "size must be a (height, width) pair of integers, got 4"),
    (lambda: good.resize((0, 4), (4, 4)), ValueError, "old must be (height, width), both >= 1, got (0, 4)"),
    (lambda: good.resize((4, 4), (4, 4.0)), TypeError, "new must be a (height, width) pair of integers, got (4, 4.0)"),
    (lambda: good.hflip(0), ValueError, "width must be an integer >= 1, got 0"),
    (lambda: good.hflip(4.0), TypeError, "width must be an integer, got 4.0"),
    (lambda: good.crop(0.5, 0, 2, 2), TypeError, "y must be an integer, got 0.5"),
    (lambda: good.crop(0, "0", 2, 2), TypeError, "x must be an integer, got '0'"),
    (lambda: good.crop(0, 0, 0, 2), ValueError, "(h, w) must be (height, width), both >= 1, got (0, 2)"),
    (lambda: good.mask((3, -1)), ValueError, "size must be (height, width), both >= 1, got (3, -1)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_collate_refuses_a_mixture_of_labelled_and_unlabelled():
    with pytest.raises(ValueError, match="boxes must all have labels or none of them"):
        dk.collate([{"boxes": good}, {"boxes": plain}])
