"""What the columns of a grid are: adapters, prompts, references, block weights; what is retained of each concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from iteris_sd import calibration, columns, composer, export, limits, lora, merger, previewing, rendering
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import finish
from iteris_sd.concepts import Library, Loaded
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, Event, MergeDone, Picture, Progress
from iteris_sd.lora import LoRA
from iteris_sd.recipe import Recipe, title


def recipe(*methods: str, **changes: Any) -> Recipe:
    told: dict[str, Any] = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "methods": [{"name": name} for name in methods or ("base", "alone", "linear", "iteris")],
        "seeds": [1],
        "steps": 2,
        "calibration": {"samples": 6, "steps": 2},
    }
    return Recipe.of(told | changes)


def composed(asked: Recipe, **options: Any) -> Composition:
    return finish(composer.compose(asked, Library.shipped(), **options))


def events(asked: Recipe) -> Iterator[Event]:
    return composer.compose(asked, Library.shipped())


def test_each_concept_alone_is_a_column_with_its_own_trigger_only(backbone: Backbone) -> None:
    asked = recipe()
    assert asked.columns == ("base", "alone:dog", "alone:barn", "linear", "iteris")
    assert [title(name) for name in asked.columns][1] == "dog alone"
    made = composed(asked)
    prompts = {picture.method: picture.prompt for picture in made.pictures}
    assert prompts == {
        "base": "a dog next to a barn",
        "alone:dog": "a <rex> dog next to a barn",
        "alone:barn": "a dog next to a <lucky> barn",
        "linear": "a <rex> dog next to a <lucky> barn",
        "iteris": "a <rex> dog next to a <lucky> barn",
    }


def test_a_concept_alone_is_drawn_by_its_own_lora(backbone: Backbone) -> None:
    made = composed(recipe("alone"))
    picked = made.concepts
    with backbone.prepared(made.tokens, picked[1].lora):
        work = rendering.render(
            backbone, "a dog next to a <lucky> barn", "", [1], rendering.Settings("ddim", 2)
        )
        (wanted,) = finish(work)
    assert made.pictures[1].image.tobytes() == wanted.image.tobytes()


def test_references_have_no_parameters_and_count_as_columns() -> None:
    with pytest.raises(UserError, match="The reference column alone has no parameters"):
        recipe(methods=[{"name": "alone", "parameters": {"alpha": 1}}])
    with pytest.raises(UserError, match="16 seeds by 5 columns make 80 pictures; at most 64"):
        recipe(seeds=list(range(16)))


def test_retention_draws_each_concept_by_its_own_lora_and_by_every_merge(backbone: Backbone) -> None:
    asked = recipe("linear", "iteris", seeds=[1, 2], retention=1)
    assert asked.count == 2 * 2 + 1 * 2 * 3
    made = composed(asked)
    assert len(made.pictures) == 4 and all(not picture.scene for picture in made.pictures)
    told = [(picture.scene, picture.method, picture.seed) for picture in made.retained]
    assert told == [
        (name, column, 1) for name in ("dog", "barn") for column in (f"alone:{name}", "linear", "iteris")
    ]
    assert all(set(picture.score.images) == {picture.scene} for picture in made.retained)
    assert made.retained[0].prompt == "a <rex> dog on the beach"
    assert export.picture_name(made.retained[0]) == "retention-dog_alone-dog_seed1.png"
    names = [one["file"] for one in export.scores(made)["retained"]]
    assert names == [export.picture_name(picture) for picture in made.retained]
    assert {row["method"] for row in export.scores(made)["summary"]} == {"linear", "iteris"}


def test_strength_changes_pictures_and_not_the_merge(backbone: Backbone) -> None:
    whole, none = composed(recipe("base", "iteris")), composed(recipe("base", "iteris", strength=0))
    for name, adapter in whole.merged["iteris"].lora.items():
        assert torch.equal(adapter.up, none.merged["iteris"].lora[name].up)
    assert whole.pictures[1].image.tobytes() != none.pictures[1].image.tobytes()
    assert whole.pictures[0].image.tobytes() == none.pictures[0].image.tobytes()
    with backbone.prepared(none.tokens):
        work = rendering.render(backbone, none.pictures[1].prompt, "", [1], rendering.Settings("ddim", 2))
        assert finish(work)[0].image.tobytes() == none.pictures[1].image.tobytes()


def test_block_weights_scale_layers_and_leave_out_what_is_zero(backbone: Backbone) -> None:
    blocks = {"text_encoder": 0.0, "down": 0.5, "up": 2.0}
    asked = recipe("linear", concepts=[{"name": "dog", "weight": 2.0, "blocks": blocks}, {"name": "barn"}])
    picked = merger.pick(asked, Library.shipped())
    own, (weighted, other) = picked[0].lora, columns.weighted(asked, picked)
    assert {lora.block(name) for name in own} > {lora.block(name) for name in weighted}
    for name, adapter in weighted.items():
        factor = 2.0 * {"down": 0.5, "mid": 1.0, "up": 2.0}[lora.block(name)]
        torch.testing.assert_close(adapter.delta(), factor * own[name].delta())
    assert list(other) == list(picked[1].lora)


def test_where_a_method_of_words_has_no_layer_to_solve_it_averages(backbone: Backbone) -> None:
    """Beside another method, whose samples of every concept lack the captions of nobody's."""
    text = {"text_encoder": 1.0, "down": 0.0, "mid": 0.0, "up": 0.0}
    concepts = [{"name": name, "blocks": text} for name in ("dog", "barn")]
    made = composed(recipe("iteris", "custom_diffusion", concepts=concepts))
    assert {report.method for report in made.merged["custom_diffusion"].reports} == {"linear"}
    assert {report.method for report in made.merged["iteris"].reports} == {"iteris"}


def test_blocks_by_name() -> None:
    assert lora.block("text_encoder.encoder.layers.0.self_attn.q_proj") == "text_encoder"
    assert lora.block("unet.down_blocks.0.attentions.0.proj_in") == "down"
    assert lora.block("unet.conv_in") == "down"
    assert lora.block("unet.mid_block.attentions.0.proj_in") == "mid"
    assert lora.block("unet.up_blocks.1.resnets.0.conv1") == lora.block("unet.conv_out") == "up"


def test_block_weights_that_leave_nothing_are_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dict.fromkeys(("text_encoder", "down", "mid", "up"), 0)
    with pytest.raises(UserError, match="All block weights of a concept are 0"):
        recipe(concepts=[{"name": "dog", "blocks": nothing}, {"name": "barn"}])
    dog, barn = merger.pick(recipe(), Library.shipped())
    only = lora.LoRA({name: adapter for name, adapter in dog.lora.items() if lora.block(name) == "up"})
    monkeypatch.setattr(merger, "pick", lambda *_: [replace(dog, lora=only), barn])
    alone = recipe(concepts=[{"name": "dog", "blocks": nothing | {"mid": 1}}, {"name": "barn"}])
    with pytest.raises(UserError, match="The block weights of dog leave nothing of its LoRA"):
        composed(alone)


def test_a_merge_is_remembered_and_pictures_come_again_to_the_pixel(backbone: Backbone) -> None:
    asked = recipe("linear", "iteris")
    first, stages = list(events(asked)), []
    for event in (again := list(events(asked))):
        if isinstance(event, Progress):
            stages.append(event.stage)
    assert [event.remembered for event in first if isinstance(event, MergeDone)] == [False, False]
    assert [event.remembered for event in again if isinstance(event, MergeDone)] == [True, True]
    assert not any(stage.startswith(("Sampling", "Merging")) for stage in stages)
    pictures = [[e.image.tobytes() for e in run if isinstance(e, Picture)] for run in (first, again)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"samples": 7, "steps": 2}},
        {"guidance": 2.0},
        {"clip_skip": 2},
        {"concepts": [{"name": "dog", "weight": 0.5}, {"name": "barn"}]},
        {"concepts": [{"name": "barn"}, {"name": "dog"}]},
        {"methods": [{"name": "iteris", "parameters": {"alpha": 0.1}}]},
    ],
)
def test_what_a_merge_depends_on_makes_it_another(backbone: Backbone, changes: dict[str, Any]) -> None:
    list(events(recipe("iteris")))
    made = [event.remembered for event in events(recipe("iteris", **changes)) if isinstance(event, MergeDone)]
    assert made == [False]


@pytest.mark.parametrize(
    "changes", [{"seeds": [5]}, {"prompt": "a {1} and a {0}"}, {"strength": 0.5}, {"steps": 1}]
)
def test_what_a_merge_does_not_depend_on_does_not(backbone: Backbone, changes: dict[str, Any]) -> None:
    list(events(recipe("iteris")))
    made = [event.remembered for event in events(recipe("iteris", **changes)) if isinstance(event, MergeDone)]
    assert made == [True]


def test_a_changed_file_is_merged_anew(backbone: Backbone, toy_assets: Any) -> None:
    list(events(recipe("linear")))
    path = toy_assets / "concepts" / "dog" / "lora.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes((toy_assets / "concepts" / "cat" / "lora.safetensors").read_bytes())
        made = [event.remembered for event in events(recipe("linear")) if isinstance(event, MergeDone)]
    finally:
        path.write_bytes(before)
    assert made == [False]


def test_previews_show_what_is_being_drawn_and_change_no_picture(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = composed(recipe("base"))
    monkeypatch.setattr(previewing, "EVERY", 0.0)
    monkeypatch.setattr(previewing, "SHARE", 0)
    found = list(composer.compose(recipe("base"), Library.shipped(), previews=True))
    shown = [event.preview for event in found if isinstance(event, Progress) and event.preview]
    assert [(one.scene, list(one.pictures)) for one in shown] == [("", [("base", 1)])] * 2
    assert all(isinstance(picture, Image.Image) for one in shown for picture in one.pictures.values())
    made = found[-1]
    assert isinstance(made, Composition)
    assert made.pictures[0].image.tobytes() == plain.pictures[0].image.tobytes()


def test_where_decoding_is_dear_a_linear_map_learnt_from_the_last_picture_stands_in(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previewing, "EVERY", 0.0)
    monkeypatch.setattr(previewing, "SHARE", 0)
    monkeypatch.setattr(previewing, "_CHEAP", 0)
    previewer = previewing.Previewer(backbone)
    with backbone.prepared({}):
        (drawn,) = finish(rendering.render(backbone, "a dog", "", [3], rendering.Settings(steps=2)))
    assert previewer.look(drawn.latents[None]) == ()
    previewer.learn([drawn])
    (seen,) = previewer.look(drawn.latents[None])
    small = drawn.image.resize((8, 8), Image.Resampling.BOX)
    mean = torch.tensor(list(small.convert("L").tobytes())).float().mean()
    close = torch.tensor(list(seen.convert("L").tobytes())).float().mean()
    assert abs(float(mean - close)) < 4


def test_a_preview_that_memory_does_not_suffice_for_costs_no_picture(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previewing, "EVERY", 0.0)
    monkeypatch.setattr(previewing, "SHARE", 0)
    previewer = previewing.Previewer(backbone)

    def scarce(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rendering, "decode", scarce)
    latents = torch.zeros(1, *backbone.latent_shape())
    assert previewer.look(latents) == previewer.look(latents) == ()


def test_nothing_unchecked_is_previewed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previewing, "EVERY", 0.0)
    monkeypatch.setattr(previewing, "SHARE", 0)
    monkeypatch.setattr(backbone.pipeline, "safety_checker", object())
    previewer = previewing.Previewer(backbone)
    assert previewer.look(torch.zeros(1, *backbone.latent_shape())) == ()


def test_strength_and_retention_are_bounded() -> None:
    with pytest.raises(UserError, match="strength"):
        recipe(strength=limits.MAX_STRENGTH + 0.1)
    assert recipe(retention=3).retained == (1,)


def test_where_few_seeds_leave_room_columns_are_drawn_together(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("base", "alone", "linear", seeds=[1, 2, 3])
    apart = composed(asked)
    monkeypatch.setattr(rendering, "together", lambda *_: 2)
    sizes: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0]) // 2))
    together = composed(asked)
    handle.remove()
    assert sizes == [2] * 4 * 2 + [
        2,
        2,
        2,
        2,
    ]  # two seeds, column by column; then one seed, two columns at once
    order = [(picture.method, picture.seed) for picture in together.pictures]
    assert order == [
        *((column, seed) for column in asked.columns for seed in (1, 2)),
        *((column, 3) for column in asked.columns),
    ]
    for one in apart.pictures:
        other = together.picture(one.method, one.seed)
        assert other is not None
        assert np.abs(np.asarray(one.image, int) - np.asarray(other.image, int)).max() <= 1
        assert other.score.text == pytest.approx(one.score.text, abs=0.05)


@pytest.mark.parametrize("second", [["barn", "dog"], ["cat", "dog"], ["cat", "barn"]])
def test_samples_are_remembered_for_the_same_words_only(backbone: Backbone, second: list[str]) -> None:
    """A learned token's id counts those learned before it: samples of another company of concepts are others."""
    later = recipe("iteris", concepts=[{"name": name} for name in second])
    wanted = composed(later).merged["iteris"].lora
    merger.forget()
    composed(recipe("iteris"))
    found = composed(later).merged["iteris"].lora
    for name, adapter in wanted.items():
        assert torch.equal(adapter.down, found[name].down) and torch.equal(adapter.up, found[name].up)


def test_samples_are_made_anew_when_a_token_within_the_trigger_has_changed(backbone: Backbone) -> None:
    """A trigger may hold the token of another concept, which may have been trained anew."""
    dog, barn = merger.pick(recipe(), Library.shipped())
    ((token, vectors),) = barn.tokens.items()
    both = replace(dog, concept=replace(dog.concept, trigger=f"{dog.concept.trigger} {token}"))
    changed = replace(barn, tokens={token: vectors + 1.0})

    def merged(picked: list[Loaded]) -> LoRA:
        with backbone.prepared(merger.all_tokens(picked)):
            return finish(merger.merged_by_all(backbone, recipe("regmean"), picked))["regmean"].lora

    merger.forget()
    merged([both, barn])
    found = merged([both, changed])
    merger.forget()
    wanted = merged([both, changed])
    assert all(torch.equal(found[name].down, adapter.down) for name, adapter in wanted.items())


def test_samples_of_a_longer_vocabulary_do_not_serve_a_shorter_one(backbone: Backbone) -> None:
    composed(recipe("iteris"))
    dog, barn = merger.pick(recipe(), Library.shipped())
    wordless = replace(dog, concept=replace(dog.concept, trigger="dog"), tokens={})
    both = [barn, wordless]
    asked = recipe("iteris", concepts=[{"name": "barn"}, {"name": "dog"}])
    with backbone.prepared(merger.all_tokens(both)):
        finish(merger.merged_by_all(backbone, asked, both))


def test_a_lora_named_by_its_path_is_drawn_alone_and_retained(backbone: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "my_dog.safetensors"
    file.write_bytes(Library.shipped().find("dog").lora.read_bytes())
    own = replace(Library.shipped().find("cat"), name="my_dog", lora=file)
    library = Library({str(file): own, **Library.shipped().concepts})
    asked = recipe(concepts=[{"name": str(file)}, {"name": "barn"}], retention=1)
    made = finish(composer.compose(asked, library))
    assert [picture.method for picture in made.pictures] == list(asked.columns)
    assert made.retained[0].scene == str(file) and set(made.retained[0].score.images) == {"my_dog"}
    assert "/" not in export.picture_name(made.retained[0]).removeprefix("retention-")


def test_a_trigger_within_another_does_not_spoil_it(backbone: Backbone) -> None:
    dog, barn = merger.pick(recipe(), Library.shipped())
    long = replace(dog, concept=replace(dog.concept, trigger="ohwx man"), tokens={})
    short = replace(barn, concept=replace(barn.concept, trigger="ohwx"), tokens={})
    asked, both = recipe(), [long, short]
    assert columns.prompt_without(asked, [short], both) == "a ohwx man next to a barn"
    assert columns.prompt_without(asked, [long], both) == "a dog next to a ohwx"
    assert columns.prompt_for_base(asked, both) == "a dog next to a barn"


def test_previews_stand_where_their_pictures_will(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previewing, "EVERY", 0.0)
    monkeypatch.setattr(previewing, "SHARE", 0)
    monkeypatch.setattr(rendering, "together", lambda *_: 4)
    forward = backbone.unet.forward

    def scarce(latents: torch.Tensor, *rest: object, **more: object) -> object:
        if len(latents) > 2:  # one picture under guidance
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest, **more)

    monkeypatch.setattr(backbone.unet, "forward", scarce)
    asked = recipe("base", "alone", seeds=[1, 2], steps=1)
    found = list(composer.compose(asked, Library.shipped(), previews=True))
    shown = [event.preview for event in found if isinstance(event, Progress) and event.preview]
    places = [place for one in shown for place in one.pictures]
    assert places == [(column, seed) for column in asked.columns for seed in (1, 2)]


def test_want_of_memory_while_measuring_loses_no_merge(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(merger, "forget", lambda: None)  # what it lets go is another matter
    monkeypatch.setattr(calibration, "measuring", never)
    with pytest.raises(UserError, match="Memory ran out while measuring IterIS"):
        finish(merger.merge_all(recipe("iteris"), Library.shipped(), measured=True))
    made = [event.remembered for event in events(recipe("iteris")) if isinstance(event, MergeDone)]
    assert made == [True]
