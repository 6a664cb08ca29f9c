"""Checks of step 2, PixelCNN: 2 (b), 2 (c) and 2 (d). 2 (a) is text."""

import torch
from torch import nn
from torch.nn import functional as F

from .judge import fail, note, rests_on
from .masked import CHANNELS, CLASSES, CONDITIONAL, OUTPUTS, WithLabel, check_causality, check_mask, depends
from .masked import kernel_of, kernel_size, make_layer, masked_calls, one_hot, seen_from, seen_places, strokes
from .probes import attempt, is_close, redraw, trace

SIZES = (1, 3, 5, 7, 9)  # of kernels
PIXELS = [(0, 0), (0, 27), (13, 0), (14, 14), (27, 26)]  # whose inputs are looked for
DRAWS = 5  # of parameters, where one draw may hide an effect by chance
MASKS = ["test_2b_mask_in_every_forward_pass", "test_2b_mask_a_hides_the_centre"]
MASKS += ["test_2b_mask_b_shows_the_centre", "test_2b_masks_hide_later_pixels"]
MASKS += ["test_2b_masks_show_earlier_pixels"]
PADDING = "test_2b_padding_is_passed_on"
LABEL = "test_2d_v_differs_between_classes_and_is_learned"


def test_2b_mask_in_every_forward_pass(code):
    """A mask that is multiplied into the weights at the start alone is undone by the first step of training."""
    for layer in (make_layer(code, "A"), make_layer(code, "B")):
        at_first = seen_places(layer, 3, "later")[0].any()
        if seen_places(redraw(layer), 3, "later")[0].any() and not at_first:
            fail("weights under the mask take part once they have changed: multiply by the mask in forward")


def mask_check(mask_types, kind, visible):
    """Return the check that masks hide or show the places of a kind."""

    @rests_on(MASKS[0])
    def check(code):
        for mask_type in mask_types:
            for size in SIZES:
                check_mask(redraw(make_layer(code, mask_type, size)), size, mask_type, kind, visible)

    return check


test_2b_mask_a_hides_the_centre = mask_check("A", "centre", visible=False)
test_2b_mask_b_shows_the_centre = mask_check("B", "centre", visible=True)
test_2b_masks_hide_later_pixels = mask_check("AB", "later", visible=False)
test_2b_masks_show_earlier_pixels = mask_check("AB", "earlier", visible=True)


@rests_on(*MASKS, PADDING)
def test_2b_a_stack_sees_earlier_pixels_alone(code):
    layers = [make_layer(code, "A", 7, inputs=1, padding=3), nn.LeakyReLU()]
    layers += [make_layer(code, "B", inputs=OUTPUTS, padding=1), nn.LeakyReLU()]
    layers += [make_layer(code, "B", inputs=OUTPUTS, padding=1)]
    pixels = [(row, column) for row in (0, 5, 11) for column in range(12)]
    x = torch.rand(1, 1, 12, 12)
    check_causality(redraw(nn.Sequential(*layers)), x, pixels, "in a stack of masks 'A', 'B', 'B'")


@rests_on(*MASKS)
def test_2b_equals_a_convolution_with_weight_times_mask(code):
    for mask_type in "AB":
        layer = redraw(make_layer(code, mask_type))
        weights = [each for each in layer.parameters() if each.shape == (OUTPUTS, CHANNELS, 3, 3)]
        kernel = kernel_of(layer, 3)
        if len(weights) != 1:
            note("the layer has no weight of the kernel's shape; its values were not compared")
        elif not is_close(kernel, weights[0].detach() * depends(kernel)):
            fail(f"with mask {mask_type!r} the layer does not convolve with weight * mask")


def check_size(code, **more):
    layer, expected = make_layer(code, "B", 5, **more), nn.Conv2d(CHANNELS, OUTPUTS, 5, **more)
    x = torch.randn(1, CHANNELS, 14, 14)
    found, size = tuple(layer(x).shape[2:]), tuple(expected(x).shape[2:])
    if found != size:
        fail(f"{[*more][0]} is not passed on: with {more} (14, 14) becomes {found}, not {size}")


def test_2b_padding_is_passed_on(code):
    check_size(code, padding=1)


def test_2b_stride_and_bias_are_passed_on(code):
    check_size(code, stride=3)
    for bias in (True, False):
        layer = redraw(make_layer(code, "B", bias=bias))
        found = bool(layer(torch.zeros(1, CHANNELS, 6, 6)).any())
        if found != bias:
            fail(f"bias is not passed on: with bias={bias} the layer has {'a' if found else 'no'} bias")


def test_2b_an_unknown_type_is_refused(code):
    make_layer(code, "B")
    try:
        make_layer(code, "C")
    except Exception:
        return
    fail("the mask type 'C' is accepted")


def test_2b_interface_layer(code):
    layer = code.MaskedConv2d("A", CHANNELS, OUTPUTS, 5, 1, 2)
    if not isinstance(layer, nn.Conv2d):
        fail("MaskedConv2d is no nn.Conv2d")
    if getattr(layer, "mask", torch.zeros(0)).shape != layer.weight.shape:
        fail("MaskedConv2d has no mask of the weight's shape")


def make_network(code):
    return redraw(attempt("PixelCNN()", code.PixelCNN))


def check_logits(networks):
    """Check that networks, functions of images alone, give a logit a pixel; large parameters tell a sigmoid."""
    outputs = [redraw(network, 1.0)(strokes(2)).detach() for network in networks]
    if outputs[0].shape != (2, 1, 28, 28):
        fail(f"images (2, 1, 28, 28) give an output {tuple(outputs[0].shape)}, not one logit a pixel")
    if all(each.min() >= 0 and each.max() <= 1 for each in outputs):
        fail("sigmoid twice: the network ends in one, and BCEWithLogitsLoss applies another")


@rests_on(*MASKS, PADDING)
def test_2c_one_logit_a_pixel(code):
    check_logits([make_network(code) for _ in range(DRAWS)])


@rests_on("test_2c_one_logit_a_pixel")
def test_2c_mask_a_in_the_first_layer_alone(code):
    """With mask 'A' behind the first layer as well, the pixel to the left is out of sight."""
    calls = masked_calls(make_network(code), code.MaskedConv2d, strokes(1))
    if not calls:
        fail("the network calls no MaskedConv2d")
    layer, x, _ = calls[0]
    size = kernel_size(layer)
    if depends(kernel_of(layer, size, x.shape[1]))[..., size // 2, size // 2].any():
        fail("the first masked layer shows the centre: it needs mask 'A'")
    seen = sum(seen_from(make_network(code), strokes(1), 14, 14).int() for _ in range(DRAWS))
    for name, pixel in (("to the left", (14, 13)), ("above", (13, 14))):
        if not seen[pixel]:
            fail(f"a logit does not depend on the pixel {name}: layers behind the first need mask 'B'")


@rests_on("test_2c_mask_a_in_the_first_layer_alone")
def test_2c_causality_of_the_network(code):
    network = make_network(code)
    if any("norm" in name for name in trace(lambda: network(strokes(1))).names):
        note("the network has normalisation; causality is judged in eval mode")
    check_causality(network, strokes(1), PIXELS, "in the network")


@rests_on("test_2c_one_logit_a_pixel")
def test_2c_twenty_steps_lower_the_nll(code):
    network, x, losses = code.PixelCNN().train(), strokes(2), []  # with the submission's own start
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(21):
        loss = F.binary_cross_entropy_with_logits(network(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(784 * loss.item())
    if not losses[-1] < losses[0]:
        fail(f"20 steps on one batch take its NLL from {losses[0]:.4g} to {losses[-1]:.4g} nats per image")


def make_conditional_network(code):
    make = code.ConditionalPixelCNN
    tries = [lambda: make(num_classes=CLASSES), lambda: make(CLASSES), make]
    return redraw(attempt("ConditionalPixelCNN(num_classes=10)", *tries))


def label_effects(code):
    """Return layer(x, y) - layer(x, y of class 0) for classes 1 to 3 and two images x, (3, 2, OUTPUTS, H, W)."""
    layer = redraw(make_layer(code, "B", name=CONDITIONAL, padding=1))
    x = torch.randn(2, CHANNELS, 6, 6)
    outputs = [WithLabel(layer, label)(x).detach() for label in range(4)]
    return torch.stack(outputs[1:]) - outputs[0]


@rests_on(*MASKS, "test_2d_v_y_is_the_same_at_every_pixel")
def test_2d_the_layer_is_masked(code):
    for mask_type in "AB":
        layer = WithLabel(redraw(make_layer(code, mask_type, 5, name=CONDITIONAL)), 3)
        for kind, visible in (("earlier", True), ("centre", mask_type == "B"), ("later", False)):
            check_mask(layer, 5, mask_type, kind, visible)


def test_2d_v_differs_between_classes_and_is_learned(code):
    effects = label_effects(code)
    if is_close(effects[0], effects[1], 1e-3) or is_close(effects[1], effects[2], 1e-3):
        fail("the effect of the label is the same for several classes")
    if is_close(effects, effects[:, :, :1].expand_as(effects), 1e-3):
        fail("the effect of the label is the same for every output channel")
    layer, x = make_layer(code, "B", name=CONDITIONAL), torch.randn(1, CHANNELS, 6, 6)
    difference = (WithLabel(layer, 1)(x) - WithLabel(layer, 2)(x)) * torch.rand(OUTPUTS, 1, 1)
    difference.sum().backward()
    if all(each.grad is None or each.grad.abs().max() < 1e-3 for each in layer.parameters()):
        fail("V is not learned: no parameter of the layer changes the effect of the label")


@rests_on(LABEL)
def test_2d_v_y_is_the_same_at_every_pixel(code):
    effects = label_effects(code)
    if not is_close(effects, effects[..., :1, :1].expand_as(effects), 1e-3):
        fail("the effect of the label differs between pixels: V y is a bias, the same everywhere")
    if not is_close(effects[:, 0], effects[:, 1], 1e-3):
        fail("the effect of the label depends on the image: V y is a bias")


@rests_on("test_2d_v_y_is_the_same_at_every_pixel")
def test_2d_v_y_is_linear(code):
    layer, x = redraw(make_layer(code, "B", name=CONDITIONAL)), torch.randn(1, CHANNELS, 6, 6)
    ys = 0 * one_hot(1), one_hot(1), one_hot(4), 0.5 * one_hot(1) + 2 * one_hot(4)
    zero, first, second, mixed = (layer(x, y) for y in ys)
    if not is_close(mixed - zero, 0.5 * (first - zero) + 2 * (second - zero), 1e-3):
        fail("the effect of the label is not linear in y, and should be V y")


@rests_on(LABEL, PADDING)
def test_2d_the_label_reaches_every_masked_layer(code):
    network, classes = make_conditional_network(code), (code.MaskedConv2d, code.ConditionalMaskedConv2d)
    calls, others = (masked_calls(WithLabel(network, label), classes, strokes(1)) for label in (1, 2))
    if not calls:
        fail("the network calls no masked layer")
    for number, ((layer, x, label), (_, _, other_label)) in enumerate(zip(calls, others), start=1):
        is_plain_head = kernel_size(layer) == 1 and not label
        if not is_plain_head and is_close(layer(x, *label), layer(x, *other_label)):
            fail(f"the label does not reach layer {number} of the network's {len(calls)} masked layers")


@rests_on("test_2d_the_layer_is_masked", PADDING)
def test_2d_causality_of_the_network(code):
    check_logits([WithLabel(make_conditional_network(code), 3) for _ in range(DRAWS)])
    check_causality(WithLabel(make_conditional_network(code), 3), strokes(1), PIXELS, "in the network")


def test_2d_interface_layer_and_network(code):
    layer = code.ConditionalMaskedConv2d("A", CHANNELS, OUTPUTS, 5, CLASSES, 1, 2)
    layer(torch.zeros(2, CHANNELS, 6, 6), one_hot(1, 2))
    code.ConditionalPixelCNN(num_classes=CLASSES)(strokes(2), one_hot(1, 2))
    if not isinstance(getattr(layer, "class_emb", None), nn.Linear):
        fail("the handout stores V as class_emb, a linear map")
