"""Closed forms are those of dense matrices, and keep what their papers promise."""

from dataclasses import dataclass

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from baselines import open_bench
from reference import Reference

from slsgu_cli.compare.anchor import OBJECT
from slsgu_cli.compare.baselines.alphaedit import alphaedit
from slsgu_cli.compare.baselines.ccup import ccup
from slsgu_cli.compare.baselines.leace import leace
from slsgu_cli.compare.baselines.memit import memit
from slsgu_cli.compare.baselines.rome import rome
from slsgu_cli.compare.baselines.uce import uce
from slsgu_cli.compare.layer_edits import LayerEdits, closed_form_of, layer_for, linear_map
from slsgu_cli.compare.registry import ClosedForm, baseline
from slsgu_cli.errors import UsageError
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.records.comparison import CLIP_METHODS, Method
from slsgu_cli.store.blocks import DataBlock

OUTPUTS, INPUTS, DAMPING = 6, 9, 0.01
MIDDLE = "transformer.resblocks.1.mlp.c_proj.weight"
CLOSED_FORMS = [m for m in CLIP_METHODS if isinstance(baseline(m), ClosedForm)]
TEXT = (Method.ROME, Method.MEMIT, Method.UCE, Method.ALPHAEDIT)
VISION = (Method.LEACE_VISION, Method.CCUP_VISION)


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def covariance(rows=40, seed=1):
    x = drawn(rows, INPUTS, seed=seed)
    return x.T @ x / rows


def test_rome_gives_its_key_the_value_and_disturbs_least():
    value, key, metric = (
        drawn(OUTPUTS),
        drawn(INPUTS, seed=2),
        RetainMetric(covariance(), 1, DAMPING),
    )
    change = rome(value, key, metric)
    torch.testing.assert_close(change @ key, value)

    def disturbance(of):
        return float((of @ metric.damped() * of).sum())

    aside = drawn(OUTPUTS, INPUTS, seed=3)
    aside -= torch.outer(aside @ key, key) / (key @ key)
    assert disturbance(change) < disturbance(change + 0.01 * aside)
    assert disturbance(change) < disturbance(change - 0.01 * aside)


def test_memit_of_one_key_is_our_direction_but_for_its_length():
    key, metric = drawn(INPUTS, seed=2), RetainMetric(covariance(), 1, DAMPING)
    gradient = torch.outer(drawn(OUTPUTS), key)
    ours = metric.steepest(gradient)
    found = memit(gradient, torch.outer(key, key), metric, 3.0)
    torch.testing.assert_close(
        F.normalize(found.flatten(), dim=0), F.normalize(ours.flatten(), dim=0)
    )
    several = memit(drawn(OUTPUTS, INPUTS), covariance(3, seed=4), metric, 0.1)
    ours = metric.steepest(drawn(OUTPUTS, INPUTS))
    assert F.cosine_similarity(several.flatten(), ours.flatten(), dim=0) < 0.99


def test_alphaedit_leaves_what_is_used_as_it_was():
    used = drawn(INPUTS, 4, seed=5)
    change = alphaedit(drawn(OUTPUTS, INPUTS), covariance(seed=6), used @ used.T, 1e-6)
    torch.testing.assert_close(change @ used, torch.zeros(OUTPUTS, 4, dtype=torch.double))
    assert change.norm() > 0.1
    assert (alphaedit(drawn(OUTPUTS, INPUTS), covariance(), covariance(), 1e-9)).norm() > 0


def test_uce_gives_keys_what_the_guide_gives():
    weight, keys, guide = drawn(OUTPUTS, INPUTS), drawn(4, INPUTS, seed=2), drawn(INPUTS, seed=3)
    metric = RetainMetric(covariance(), 1, DAMPING)
    change = uce(weight, keys, guide, metric, 1e-9)
    torch.testing.assert_close((weight + change) @ keys.T, (weight @ guide)[:, None].expand(-1, 4))
    kept = uce(weight, keys, guide, metric, 1e9)
    torch.testing.assert_close(kept, torch.zeros_like(weight), atol=1e-6, rtol=0)


def test_after_leace_no_output_covaries_with_the_label():
    rows, label = drawn(60, INPUTS), torch.arange(60) < 20
    rows[label] += drawn(INPUTS, seed=7)
    apart = rows[label].mean(0) - rows[~label].mean(0)
    weight = drawn(OUTPUTS, INPUTS, seed=8)
    metric = RetainMetric(rows[~label].T @ rows[~label] / 40, 1, DAMPING)
    outputs = rows @ (weight + leace(weight, apart, metric)).T
    centred = label.double() - label.double().mean()
    assert (rows @ weight.T * centred[:, None]).mean(0).abs().max() > 0.05
    torch.testing.assert_close(
        (outputs * centred[:, None]).mean(0), torch.zeros(OUTPUTS, dtype=torch.double)
    )


def test_ccup_projects_the_feature_away():
    weight, state = drawn(OUTPUTS, INPUTS), drawn(INPUTS, seed=2)
    feature = weight @ state
    after = (weight + ccup(weight, 3 * feature, 1.0)) @ state
    torch.testing.assert_close(after, torch.zeros(OUTPUTS, dtype=torch.double))
    half = (weight + ccup(weight, feature, 0.5)) @ state
    torch.testing.assert_close(half, feature / 2)


@dataclass
class Dense:
    """What closed forms are made of, by open_clip's own forward over whole texts, in numpy."""

    world: object

    def __post_init__(self):
        self.model = open_clip.create_model(self.world.model.name).eval()

    def block(self, role):
        return DataBlock.open(self.world.store, getattr(self.world.manifest, role))

    def seen(self, layer, role, weights=None):
        """Return inputs and gradients (rows, positions, ...), valid positions, ends, features."""
        block, model = self.block(role), self.model
        ids = torch.from_numpy(np.asarray(block.tokens)).long()
        ends, uses = ids.argmax(-1), []
        listened = {
            "text_projection": model.ln_final,
            "visual.proj": model.visual.ln_post,
        }.get(layer) or model.get_submodule(layer.removesuffix(".weight"))
        by_module = layer.endswith(".weight")
        hook = listened.register_forward_hook(
            lambda module, args, out: uses.append((args[0] if by_module else out, out))
        )
        spec = self.world.manifest.input
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        pixels = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
        v = model.encode_image((pixels - mean) / std, normalize=True)
        t = model.encode_text(ids, normalize=True)
        hook.remove()
        inputs, outputs = uses[0]
        if weights is None:
            weights = torch.full((len(ids),), 1 / len(ids))
        gradients = None
        if by_module:
            loss = (weights * (1 - (v * t).sum(-1))).sum()
            (gradients,) = torch.autograd.grad(loss, [outputs])
        valid = torch.arange(ids.shape[1]) <= ends[:, None]
        return inputs.detach(), gradients, valid, ends, t.detach()

    def keys(self, layer, role):
        inputs, _, _, ends, _ = self.seen(layer, role)
        rows = torch.arange(len(inputs))
        return as_numpy(inputs[rows, 0 if layer == "visual.proj" else ends])

    def covariance(self, layer, role):
        inputs, _, valid, _, _ = self.seen(layer, role)
        if layer in ("visual.proj", "text_projection"):
            x = self.keys(layer, role)
        else:
            x = as_numpy(inputs[valid])
        return x.T @ x / len(x)

    def change(self, method, setting, layer):
        """Return a method's change by the formulas as they are printed."""
        weight = as_numpy(linear_map(layer, self.model.get_parameter(layer).detach()))
        if method in (Method.CCUP_TEXT, Method.CCUP_VISION):
            u = as_numpy(self.seen("text_projection", "forget")[4]).mean(0)
            u /= np.linalg.norm(u)
            return -setting * np.outer(u, u) @ weight
        if method is Method.DIFFQUICKFIX:
            keys, anchors = self.named_inputs("blue", OBJECT)
            goals = np.concatenate([(anchors - keys) @ weight.T, np.zeros(weight.T.shape)])
            rows = np.concatenate([keys, setting**0.5 * np.eye(keys.shape[1])])
            return np.linalg.lstsq(rows, goals, rcond=None)[0].T
        c = self.covariance(layer, "retain")
        forget, retain = self.keys(layer, "forget"), self.keys(layer, "retain")
        identity = np.eye(len(c))
        metric = c + DAMPING * np.trace(c) / len(c) * identity
        damped = c + setting * np.trace(c) / len(c) * identity
        if method in (Method.LEACE_TEXT, Method.LEACE_VISION):
            m = forget.mean(0) - retain.mean(0)
            inverse = np.linalg.inv(damped)
            return -weight @ np.outer(m, inverse @ m) / (m @ inverse @ m)
        if method is Method.UCE:
            k = forget.T / len(forget) ** 0.5
            guides = np.tile(retain.mean(0), (len(forget), 1)).T / len(forget) ** 0.5
            return weight @ (guides - k) @ k.T @ np.linalg.inv(k @ k.T + setting * metric)
        if method is Method.ROME:
            _, gradients, _, ends, _ = self.seen(layer, "forget")
            value = as_numpy(gradients[torch.arange(len(ends)), ends]).sum(0)
            k, inverse = forget.mean(0), np.linalg.inv(damped)
            return np.outer(value, inverse @ k) / (k @ inverse @ k)
        return self._of_all_tokens(method, setting, layer, c, metric)

    def named_inputs(self, name, other):
        """Return the inputs of the first attention's output projection at names and ends."""
        model, block = self.model, self.model.transformer.resblocks[0]
        tokenize = open_clip.get_tokenizer(self.world.model.name)
        captions = list(dict.fromkeys(self.block("forget").captions))
        parts = []
        for word in (name, other):
            ids = tokenize([caption.replace(name, word) for caption in captions])
            ends, last = ids.argmax(-1), tokenize([word])[0]
            last = last[last.argmax() - 1]
            normed = block.ln_1(model.token_embedding(ids) + model.positional_embedding)
            attention = block.attn
            packed = normed @ attention.in_proj_weight.T + attention.in_proj_bias
            heads = (*ids.shape, attention.num_heads, -1)
            q, k, v = (each.view(heads).transpose(1, 2) for each in packed.chunk(3, dim=-1))
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + model.attn_mask
            mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            rows = torch.arange(len(ids))
            named = (ids == last).int().argmax(dim=1)
            assert (ids == last).any(dim=1).all()
            parts.append(as_numpy(torch.cat([mixed[rows, ends], mixed[rows, named]])))
        return parts

    def _of_all_tokens(self, method, setting, layer, c, metric):
        rows = self.block("forget").rows
        sizes = [min(16, rows - start) for start in range(0, rows, 16)]
        weights = torch.tensor([1 / size / len(sizes) for size in sizes for _ in range(size)])
        inputs, gradients, valid, _, _ = self.seen(layer, "forget", weights)
        k, r = as_numpy(inputs[valid]).T, as_numpy(gradients[valid]).T
        own = k @ k.T / k.shape[1]
        if method is Method.MEMIT:
            return r @ k.T @ np.linalg.inv(setting * metric + own)
        values, vectors = np.linalg.eigh(c)
        quiet = vectors[:, values < setting * values.mean()]
        q = quiet @ quiet.T
        return r @ k.T @ q @ np.linalg.inv(own @ q + np.trace(own) / len(own) * np.eye(len(own)))


def as_numpy(values):
    return values.detach().double().numpy()


@pytest.fixture(scope="module")
def bench(shared_world, tmp_path_factory):
    """A bench in a store of its own: covariances are written into it."""
    return open_bench(shared_world.copied(tmp_path_factory.mktemp("closed-forms") / "store"))


@pytest.fixture(scope="module")
def forms(shared_world, bench):
    store, pointer = shared_world.store, shared_world.pointer
    layers = {m: layer_for(closed_form_of(m), store, pointer, None) for m in CLOSED_FORMS}
    return LayerEdits(bench, layers)


@pytest.fixture(scope="module")
def dense(shared_world):
    return Dense(shared_world)


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("setting", [0.1, 1.0])
def test_changes_are_those_of_dense_matrices(method, setting, forms, dense):
    layer = forms.layers[method]
    expected = torch.from_numpy(dense.change(method, setting, layer))
    found = forms.change(method, setting, layer)
    assert found.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", TEXT)
def test_a_projection_on_the_right_is_edited_alike(method, forms, dense):
    found = forms.change(method, 0.1, "text_projection")
    assert found.shape == forms.baselines.model.text_projection.T.shape
    if method is Method.UCE:
        expected = torch.from_numpy(dense.change(method, 0.1, "text_projection"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_edits_are_where_they_belong(forms):
    assert {forms.layers[method] for method in TEXT} == {MIDDLE}
    assert {forms.layers[method] for method in VISION} == {"visual.proj"}
    assert forms.layers[Method.LEACE_TEXT] == "text_projection"


@pytest.mark.parametrize("wanted", ["visual.proj", "ln_final", "in_proj_weight", "c_proj"])
def test_a_layer_that_cannot_be_edited_is_refused(wanted, shared_world):
    with pytest.raises(UsageError, match="--layer"):
        layer_for(closed_form_of(Method.ROME), shared_world.store, shared_world.pointer, wanted)


def test_a_layer_can_be_named_as_tables_name_it(shared_world):
    found = layer_for(
        closed_form_of(Method.UCE), shared_world.store, shared_world.pointer, "2.attn.out_proj"
    )
    assert found == "transformer.resblocks.2.attn.out_proj.weight"


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_figures_are_those_of_the_edited_model(method, forms, shared_world):
    outcome = forms.run(method, 0.1)
    layer = forms.layers[method]
    reference = Reference(shared_world)
    change = linear_map(layer, forms.change(method, 0.1, layer)).float()
    reference.model.get_parameter(layer).data.add_(change, alpha=outcome.step)
    expected = reference.figures()
    assert (outcome.forget.top1, outcome.forget.top5) == expected.forget
    assert {n: (a.top1, a.top5) for n, a in outcome.utility.items()} == expected.utility
    assert outcome.layer == layer
    assert outcome.seconds > 0
    assert (outcome.forget_passes, outcome.retain_passes) == (
        float(method in (Method.ROME, Method.MEMIT, Method.ALPHAEDIT)),
        0.0,
    )
