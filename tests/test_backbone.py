"""The base model: adapters and tokens go in, act as they should, and leave no trace."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iteris_sd import backbone as backbones
from iteris_sd import bases
from iteris_sd.backbone import Backbone
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.layers import check_fit
from iteris_sd.lora import LoRA, LowRank
from tests import toybook

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT_LAYER = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def dog(toy: Path) -> Generator:
    """The dog of the toy library, loaded."""
    yield Library.shipped().find("dog").load()


def test_layers_go_by_canonical_names(backbone: Backbone) -> None:
    assert backbone.layers[LAYER].weight.shape == (8, toybook.WIDTH)
    assert backbone.layers[TEXT_LAYER].weight.shape == (toybook.WIDTH, toybook.WIDTH)
    assert backbone.latent_shape() == (4, 8, 8)
    assert backbone.tokenise(["a dog", ""]).shape == (2, backbone.tokenizer.model_max_length)


def test_a_prepared_model_is_as_before_afterwards(backbone: Backbone, dog) -> None:
    before, states = toybook.trace(backbone), backbone.encode(["a dog"])
    with backbone.prepared(dog.tokens, dog.lora):
        during = toybook.trace(backbone)
        assert {key for key in before if before[key] != during[key]} >= {
            "tokenizer",
            "embeddings",
            "unet modules",
        }
        assert not torch.equal(backbone.encode(["a dog"]), states)
    assert toybook.trace(backbone) == before
    assert torch.equal(backbone.encode(["a dog"]), states)


def test_an_error_in_the_block_leaves_no_trace(backbone: Backbone, dog) -> None:
    before = toybook.trace(backbone)
    with pytest.raises(ZeroDivisionError), backbone.prepared(dog.tokens, dog.lora):
        raise ZeroDivisionError
    assert toybook.trace(backbone) == before


def test_a_closed_generator_leaves_no_trace(backbone: Backbone, dog) -> None:
    def work() -> Generator[None]:
        with backbone.prepared(dog.tokens), backbone.prepared({}, dog.lora):
            yield

    before = toybook.trace(backbone)
    with closing(work()) as started:
        next(started)
        assert toybook.trace(backbone) != before
    assert toybook.trace(backbone) == before


def test_a_refused_token_or_lora_leaves_no_trace(backbone: Backbone, dog) -> None:
    before = toybook.trace(backbone)
    wrong = LoRA({LAYER: LowRank(torch.zeros(2, 5), torch.zeros(8, 2))})
    with pytest.raises(UserError), backbone.prepared(dog.tokens, wrong):
        pass
    with pytest.raises(UserError, match=r"'<big>' has vectors of the shape \(1, 768\), .* them 16 wide"):
        backbone.prepared({"<big>": torch.zeros(1, 768)}).__enter__()
    with pytest.raises(UserError, match="knows the token 'dog</w>' already"):
        backbone.prepared({"dog</w>": torch.zeros(1, toybook.WIDTH)}).__enter__()
    assert toybook.trace(backbone) == before


def test_hooks_do_what_added_weights_do(backbone: Backbone, dog) -> None:
    latents = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return backbone.unet(latents, 500, backbone.encode(["a dog", "a barn"])).sample

    plain = predicted()
    with backbone.prepared({}, dog.lora):
        hooked = predicted()
    kept = {name: backbone.layers[name].weight.data for name in dog.lora}
    for name, adapter in dog.lora.items():
        backbone.layers[name].weight.data = kept[name] + adapter.delta()
    added = predicted()
    for name, weight in kept.items():
        backbone.layers[name].weight.data = weight
    assert not torch.allclose(hooked, plain, atol=1e-2)
    torch.testing.assert_close(hooked, added, rtol=1e-4, atol=1e-4)


def test_two_tokens_at_once(backbone: Backbone, dog) -> None:
    barn = Library.shipped().find("barn").load()
    with backbone.prepared(dog.tokens | barn.tokens):
        both = backbone.encode(["a <rex> dog next to a <lucky> barn", "a <rex> dog", "a <lucky> barn"])
        first, second = backbone.tokenise(["<rex>", "<lucky>"])[:, 1].tolist()
        table = backbone.text_encoder.get_input_embeddings().weight
        assert torch.equal(table[first], dog.tokens["<rex>"][0])
        assert torch.equal(table[second], barn.tokens["<lucky>"][0])
    with backbone.prepared(dog.tokens):
        alone = backbone.encode(["a <rex> dog"])
    torch.testing.assert_close(alone[0], both[1])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (LAYER, (8, 5), f"does not fit {LAYER}: it is 8 × 5 and the layer 8 × {toybook.WIDTH}"),
        ("unet.no.such.layer", (8, 8), r"touches unet\.no\.such\.layer, which this model does not have"),
        ("unet.conv_in", (8, 4), r"does not fit unet\.conv_in: it is 8 × 4 and the layer 8 × 36"),
        ("unet.conv_in", (8, 36), r"is for a kernel of \(1, 1\) and the layer has \(3, 3\)"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    backbone: Backbone, name: str, shape: tuple[int, int], message: str
) -> None:
    wrong = LoRA({name: LowRank(torch.zeros(2, shape[1]), torch.zeros(shape[0], 2))})
    with pytest.raises(UserError, match=message):
        check_fit(wrong, backbone.layers, "The LoRA of dog")


def test_missing_weights_are_told_in_a_sentence(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(bases.find("storybook"), source=str(tmp_path))
    monkeypatch.setitem(bases.BASES, "storybook", gone)
    with pytest.raises(UserError, match="The weights of Storybook are not at"):
        backbones.load("storybook")
    with pytest.raises(UserError, match="no base model 'sdxl'; choose one of storybook"):
        backbones.load("sdxl")


def test_a_token_of_several_vectors_is_one_word(backbone: Backbone) -> None:
    vectors = torch.randn(3, toybook.WIDTH, generator=torch.Generator().manual_seed(0))
    before = toybook.trace(backbone)
    with backbone.prepared({"<big>": vectors}):
        assert backbone.spell("a <big> dog, a <big>_x") == "a <big> <big>_1 <big>_2 dog, a <big>_x"
        ids = backbone.tokenise(["a <big> dog"])[0].tolist()
        at = ids.index(backbone.tokenizer.convert_tokens_to_ids("<big>"))
        table = backbone.text_encoder.get_input_embeddings().weight
        assert torch.equal(table[ids[at : at + 3]], vectors)
        assert torch.equal(backbone.encode(["a <big> dog"]), backbone.states(torch.tensor([ids])))
    assert toybook.trace(backbone) == before and backbone.spell("a <big> dog") == "a <big> dog"


def test_a_token_of_several_vectors_is_known_in_whatever_case(backbone: Backbone) -> None:
    with backbone.prepared({"<Big>": torch.ones(2, toybook.WIDTH), "<big>g": torch.ones(2, toybook.WIDTH)}):
        assert backbone.spell("<BIG>, <big> <BIG>G") == "<Big> <Big>_1, <Big> <Big>_1 <big>g <big>g_1"
        ids = backbone.tokenise(["<Big>", "<BIG>", "<big>"])
        assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])
    with backbone.prepared({r"<a\1s>": torch.ones(2, toybook.WIDTH)}):
        # The long s is an s of another case to regular expressions alone.
        assert backbone.spell("<A\\1S> <a\\1ſ>") == "<a\\1s> <a\\1s>_1 <a\\1ſ>"


@pytest.mark.parametrize("other", ["<a>_1", "<A>", "<A>_2"])
def test_no_two_vectors_go_by_one_name(backbone: Backbone, other: str) -> None:
    """The tokenizer would keep one of them, and all that come after would have another's vector."""
    before = toybook.trace(backbone)
    tokens = {"<a>": torch.ones(3, toybook.WIDTH), other: torch.ones(1, toybook.WIDTH)}
    with pytest.raises(UserError, match=f"Two learned vectors would be called '{other}'.*rename the token"):
        backbone.prepared(tokens).__enter__()
    assert toybook.trace(backbone) == before


def test_clip_skip_reads_an_earlier_layer(backbone: Backbone) -> None:
    plain = backbone.encode(["a dog"])
    encoder = getattr(backbone.text_encoder, "text_model", backbone.text_encoder)
    kept: list[torch.Tensor] = []
    handle = encoder.encoder.layers[0].register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with backbone.prepared({}, clip_skip=2):
        skipped = backbone.encode(["a dog"])
        with backbone.prepared({}):
            assert torch.equal(backbone.encode(["a dog"]), skipped)  # an inner block leaves it as it is
    handle.remove()
    assert not torch.allclose(skipped, plain)
    assert torch.equal(skipped, encoder.final_layer_norm(kept[0]))
    assert torch.equal(backbone.encode(["a dog"]), plain)
