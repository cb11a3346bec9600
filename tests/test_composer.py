"""The road as a stream: it can be stopped at every denoising step, and then leaves no trace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iteris_sd import bases, calibration, columns, composer, intervals, merger, samples, scoring
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import Merged
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone, Picture, Progress
from iteris_sd.recipe import Recipe
from tests import toybook

RECIPE = Recipe.of(
    {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "methods": [{"name": "base"}, {"name": "linear"}, {"name": "iteris"}],
        "seeds": [1],
        "steps": 2,
        "calibration": {"samples": 12, "steps": 3},
    }
)


def test_no_two_passes_of_the_unet_without_an_event(backbone: Backbone) -> None:
    passes: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    events, since = [], []
    for event in composer.compose(RECIPE, Library.shipped()):
        events.append(event)
        since.append(len(passes))
        passes.clear()
    handle.remove()
    assert max(since) == 1 and sum(since) >= 3 * RECIPE.steps
    made = [type(event) for event in events if not isinstance(event, Progress)]
    assert made == [MergeDone, MergeDone, Picture, Picture, Picture, Composition]
    told = [event for event in events if isinstance(event, Progress)]
    assert all(0 <= event.done <= event.total and event.total > 0 for event in told)
    assert "Drawing IterIS, seed 1" in {event.stage for event in told}


def test_stopping_anywhere_leaves_no_trace(backbone: Backbone) -> None:
    before = toybook.trace(backbone)
    events = len(list(composer.compose(RECIPE, Library.shipped())))
    assert toybook.trace(backbone) == before
    for stop in (1, 4, events // 2, events - 2):
        merger.forget()  # so that every time there is as much to do
        work = composer.compose(RECIPE, Library.shipped())
        for _ in range(stop):
            next(work)
        work.close()
        assert toybook.trace(backbone) == before


def changed(methods: list[dict], **calibration: int) -> Recipe:
    data = RECIPE.model_dump()
    return Recipe.of(data | {"methods": methods, "calibration": {**data["calibration"], **calibration}})


def merged(recipe: Recipe) -> dict[str, Merged]:
    merger.forget()
    return calibration.finish(merger.merge_all(recipe, Library.shipped()))[1]


def test_what_sees_nothing_but_text_is_merged_without_pictures(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed([{"name": "iteris", "parameters": {"targets": "text"}}])
    passes: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    quick = merged(recipe)["iteris"].lora
    assert not passes
    monkeypatch.setattr(samples, "text_only", lambda names: False)
    slow = merged(recipe)["iteris"].lora
    handle.remove()
    assert passes
    for name in quick:
        torch.testing.assert_close(quick[name].delta(), slow[name].delta(), rtol=1e-3, atol=1e-6)


def test_guidance_can_be_calibrated_for_too(backbone: Backbone) -> None:
    plain, both = changed([{"name": "iteris"}]), changed([{"name": "iteris"}], unconditional=5)
    loaded = Library.shipped().find("dog").load()
    with backbone.prepared(loaded.tokens):
        few = calibration.finish(samples.gather(backbone, loaded, loaded.lora, plain))
        more = calibration.finish(samples.gather(backbone, loaded, loaded.lora, both))
        empty = backbone.tokenise([""])
    assert (len(few), len(more)) == (12, 17)
    assert torch.equal(more.ids[:12], few.ids) and torch.equal(more.ids[12:], empty.expand(5, -1))
    for part, whole in zip(few.pictured(), more.pictured(), strict=True):
        assert torch.equal(whole[:12], part) and torch.equal(whole[12:], part[:5])
    assert merged(both)["iteris"].micro_batch == 64
    with pytest.raises(UserError, match="13 samples without a prompt need as many with one, found 12"):
        changed([{"name": "iteris"}], unconditional=13)


def test_custom_diffusion_looks_at_the_concepts_own_words(backbone: Backbone) -> None:
    picked = [Library.shipped().find(name).load() for name in ("dog", "barn")]
    tokens = {token: vectors for one in picked for token, vectors in one.tokens.items()}
    with backbone.prepared(tokens):
        given = samples.of_words(backbone, picked, {"unet.k"}, captions=30)
        assert given.rows == (len(samples.ALONE), len(samples.ALONE), 30) and given.kept is not None
        for one, kept in zip(picked, given.kept, strict=False):
            ids = backbone.tokenise([t.format(one.concept.trigger) for t in samples.ALONE])
            told = [backbone.tokenizer.decode(row[k]) for row, k in zip(ids, kept, strict=True)]
            assert {words.replace("</w>", "").replace(" ", "") for words in told} == {
                one.concept.trigger.replace(" ", "")
            }
    passes: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    found = merged(changed([{"name": "custom_diffusion"}]))["custom_diffusion"]
    handle.remove()
    assert not passes
    solved = {r.name for r in found.reports if r.method == "custom_diffusion"}
    assert solved and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in solved)
    assert {r.method for r in found.reports if r.name not in solved} == {"linear"}


def test_what_is_missing_is_told_before_the_work(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise UserError("There is no scorer.")

    monkeypatch.setattr(scoring, "load", absent)
    stages: set[str] = set()
    with pytest.raises(UserError, match="no scorer"):
        stages.update(e.stage for e in composer.compose(RECIPE, Library.shipped()) if isinstance(e, Progress))
    assert not any("Sampling" in stage or "Merging" in stage for stage in stages)


def asked(**changes: object) -> Recipe:
    return Recipe.of(RECIPE.model_dump() | {"methods": [{"name": "linear"}], **changes})


def test_weights_of_words_reach_the_models_and_not_the_scorer(toy: Path) -> None:
    recipe = asked(prompt="a ({0}:1.3) next to a {1}, (smile)")
    picked = merger.pick(recipe, Library.shipped())
    assert columns.prompt_with_triggers(recipe, picked) == "a (<rex> dog:1.3) next to a <lucky> barn, (smile)"
    assert columns.prompt_for_base(recipe, picked) == "a (dog:1.3) next to a barn, (smile)"
    assert columns.prompt_in_plain_words(recipe, picked) == "a dog next to a barn, smile"


def test_brackets_of_a_trigger_are_part_of_it(toy: Path) -> None:
    dog = replace(Library.shipped().find("dog"), trigger="rex (dog)")
    recipe = asked(concepts=[{"name": "dog"}], prompt="a {0} on the beach")
    picked = merger.pick(recipe, Library({"dog": dog}))
    assert columns.prompt_with_triggers(recipe, picked) == r"a rex \(dog\) on the beach"
    assert columns.prompt_for_base(recipe, picked) == "a dog on the beach"
    assert columns.prompt_in_plain_words(recipe, picked) == "a dog on the beach"


def test_lcm_needs_a_lora_that_was_made_for_it(toy: Path) -> None:
    recipe = asked(sampler="lcm", concepts=[{"name": "dog"}], prompt="a {0}")
    with pytest.raises(UserError, match="needs an LCM-LoRA among the concepts, found none"):
        merger.pick(recipe, Library.shipped())
    distilled = replace(Library.shipped().find("dog"), source="latent-consistency/lcm-lora-sdv1-5")
    assert merger.pick(recipe, Library({"dog": distilled}))[0].distils
    assert not replace(merger.pick(asked(), Library.shipped())[0]).distils


def test_a_blanked_picture_is_flagged_and_not_scored(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def checked(pixels: torch.Tensor, device: object, dtype: object) -> tuple[torch.Tensor, list[bool]]:
        seen.append(1)
        return pixels, [len(seen) == 1]

    monkeypatch.setattr(backbone.pipeline, "run_safety_checker", checked)
    made = calibration.finish(composer.compose(asked(seeds=[1, 2]), Library.shipped()))
    blanked, fine = made.pictures
    assert blanked.flagged and blanked.score == scoring.UNSCORED
    assert not fine.flagged and fine.score.text is not None
    assert {row.n for row in intervals.summarise(made.pictures)} == {1}


def test_pictures_are_drawn_without_a_scorer(backbone: Backbone) -> None:
    made = calibration.finish(composer.compose(asked(scorer="none"), Library.shipped()))
    assert made.pictures[0].score == scoring.UNSCORED and made.scorer.startswith("nobody")
    assert intervals.summarise(made.pictures) == []


def test_a_scorer_that_cannot_be_downloaded_leaves_pictures_unscored(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(bases.find("storybook"), scorer="vit-l-14")
    monkeypatch.setitem(bases.BASES, "storybook", base)

    def absent(name: str) -> None:
        raise UserError(f"The scorer {name} could not be loaded: no network.")

    monkeypatch.setattr(scoring, "load", absent)
    made = calibration.finish(composer.compose(asked(), Library.shipped()))
    assert made.scorer == "nobody: The scorer vit-l-14 could not be loaded: no network."
    with pytest.raises(UserError, match="The scorer vit-l-14"):  # asked for by name, it must be there
        calibration.finish(composer.compose(asked(scorer="vit-l-14"), Library.shipped()))


def test_where_memory_runs_out_a_merge_goes_on_with_smaller_batches(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merged(asked(methods=[{"name": "iteris"}]))["iteris"].lora
    forward, sizes = backbone.unet.forward, []

    def scarce(latents: torch.Tensor, *rest: object, **more: object) -> object:
        sizes.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest, **more)

    most = 20  # what a trajectory takes, ten under guidance
    monkeypatch.setattr(samples, "micro_batch", lambda places: 32)
    monkeypatch.setattr(backbone.unet, "forward", scarce)
    less = merged(asked(methods=[{"name": "iteris"}]))["iteris"].lora
    assert max(sizes) > most and sizes[-1] <= most
    for name in whole:
        wanted = whole[name].delta()
        assert (less[name].delta() - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("method", ["iteris", "custom_diffusion", "linear"])
def test_where_memory_never_suffices_it_is_told(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibration, "merge", never)
    with pytest.raises(UserError, match="Memory ran out while merging by .* Look at fewer tokens per sample"):
        merged(asked(methods=[{"name": method}]))


def test_where_memory_runs_out_samples_are_taken_in_smaller_batches(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole, *_) = gathered(backbone)
    forward, sizes = backbone.unet.forward, []

    def scarce(latents: torch.Tensor, *rest: object, **more: object) -> object:
        sizes.append(len(latents))
        if len(latents) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest, **more)

    monkeypatch.setattr(backbone.unet, "forward", scarce)
    (less, *_) = gathered(backbone)
    assert max(sizes) > 10 >= sizes[-1]
    (x, t), (wanted, times) = less.pictured(), whole.pictured()
    assert torch.equal(t, times)
    torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-4)


def gathered(backbone: Backbone) -> list[samples.Inputs]:
    merger.forget()
    picked = merger.pick(RECIPE, Library.shipped())
    with backbone.prepared(merger.all_tokens(picked)):
        return calibration.finish(merger.collect(backbone, RECIPE, picked, {"unet.conv_in"}))


def test_a_trigger_of_several_vectors_is_found_among_its_words(backbone: Backbone) -> None:
    (dog,) = merger.pick(asked(concepts=[{"name": "dog"}], prompt="a {0}"), Library.shipped())
    several = replace(dog, tokens={"<rex>": torch.randn(3, toybook.WIDTH)})
    with backbone.prepared(several.tokens):
        found = samples.of_words(backbone, [several], set(backbone.layers))
    assert found.kept is not None and found.kept[0].sum(dim=1).tolist() == [4] * len(samples.ALONE)


def test_brackets_of_a_trigger_are_no_weights_in_samples(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dog,) = merger.pick(asked(concepts=[{"name": "dog"}], prompt="a {0}"), Library.shipped())
    named = replace(dog, concept=replace(dog.concept, trigger="(dog:1.3)"))
    asked_for: list[str] = []
    monkeypatch.setattr(backbone, "encode", lambda prompts: asked_for.extend(prompts))
    calibration.finish(samples.gather(backbone, named, dog.lora, RECIPE))
    assert not asked_for  # nothing that would read them


def test_clip_skip_changes_samples_and_pictures_alike(backbone: Backbone) -> None:
    one, two = (merged(asked(methods=[{"name": "iteris"}], clip_skip=k))["iteris"].lora for k in (1, 2))
    assert any(not torch.allclose(one[name].delta(), two[name].delta()) for name in one)
    first = calibration.finish(composer.compose(asked(), Library.shipped())).pictures[0].image
    second = calibration.finish(composer.compose(asked(clip_skip=2), Library.shipped())).pictures[0].image
    assert first.tobytes() != second.tobytes()
