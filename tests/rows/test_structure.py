"""Wrong row groupings: an error that names the place if values may be read, and
otherwise NaN, never a wrong number.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import advantages as adv
from reweight_ops._core.calls import hidden
from reweight_ops._core.rows import grouped, rows, structure
from reweight_ops.advantages import segments

N, V, D = 10, 7, 5
G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(N, V, generator=G)
HIDDEN, HEAD = torch.randn(N, D, generator=G), torch.randn(V, D, generator=G)
IDS = torch.randint(V, (N,), generator=G)
OLD = -torch.rand(N, generator=G) - 0.5
REF = -torch.rand(N, generator=G) - 0.5
POLICY = dict(old_per_token_logps=OLD)


def policy(x, **k):
    return rw.policy_loss(x, IDS, 1.0, **{"spec": "dapo", **POLICY, **k})


#: Every op that takes sequences, on its own kind of rows.
OPS = {
    "policy_loss": (LOGITS, policy),
    "policy_loss, sequence ratio": (LOGITS, lambda x, **k: policy(x, spec="gspo", **k)),
    "policy_loss, sequence advantages": (
        LOGITS,
        lambda x, **k: rw.policy_loss(x, IDS, torch.ones(2, 1), spec="dapo", **{**POLICY, **k}),
    ),
    "policy_loss_from_logps": (
        OLD,
        lambda x, **k: rw.policy_loss_from_logps(x, 1.0, spec="grpo", **{**POLICY, **k}),
    ),
    "linear_policy_loss": (
        HIDDEN,
        lambda x, **k: rw.linear_policy_loss(x, HEAD, IDS, 1.0, spec="grpo", **{**POLICY, **k}),
    ),
    "preference_loss": (
        LOGITS,
        lambda x, **k: rw.preference_loss(x, IDS, spec="dpo", ref_per_token_logps=REF, **k),
    ),
    "preference_loss_from_logps": (
        OLD,
        lambda x, **k: rw.preference_loss_from_logps(x, spec="dpo", ref_per_token_logps=REF, **k),
    ),
    "linear_preference_loss": (
        HIDDEN,
        lambda x, **k: rw.linear_preference_loss(
            x, HEAD, IDS, spec="dpo", ref_per_token_logps=REF, **k
        ),
    ),
}
OUTSIDE = torch.tensor([0, 0, 0, 1, 1, 7, 1, 0, 0, 1])
MALFORMED = {
    "first": (dict(cu_seqlens=torch.tensor([2, 5, 10])), r"cu_seqlens\[0\] is 2, expected 0"),
    "falls": (dict(cu_seqlens=torch.tensor([0, 8, 5])), r"cu_seqlens\[2\] is 5, less than cu_seqlens\[1\] = 8"),
    "beyond": (dict(cu_seqlens=torch.tensor([0, 3, 99])), r"cu_seqlens\[2\] is 99, but there are 10 rows"),
    "negative": (dict(cu_seqlens=torch.tensor([0, -1, 10])), r"cu_seqlens\[1\] is -1, less than cu_seqlens\[0\] = 0"),
    "descending": (dict(cu_seqlens=torch.tensor([10, 3, 0], dtype=torch.int32)), r"cu_seqlens\[0\] is 10, expected 0"),
    "ids above": (dict(sequence_ids=OUTSIDE, num_sequences=2), r"sequence_ids\[5\] \(flat\) is 7, outside \[0, num_sequences = 2\)"),
    "ids below": (dict(sequence_ids=OUTSIDE.clamp(max=1).int() - 1, num_sequences=2), r"sequence_ids\[0\] \(flat\) is -1"),
}  # fmt: skip
FINE = {
    "offsets": dict(cu_seqlens=torch.tensor([0, 4, 10])),
    "offsets before the end": dict(cu_seqlens=torch.tensor([0, 4, 8])),
    "an empty sequence": dict(cu_seqlens=torch.tensor([0, 0, 10], dtype=torch.int32)),
    "ids": dict(sequence_ids=OUTSIDE.clamp(max=1), num_sequences=2),
    "ids of an ignored row": dict(
        sequence_ids=OUTSIDE, num_sequences=2, completion_mask=OUTSIDE < 2
    ),
}


@pytest.fixture
def unread(monkeypatch):
    """A CPU on which no value may be read, like a GPU."""
    for module in (structure, rows, grouped, hidden):
        monkeypatch.setattr(module, "is_readable", lambda t: False)


def result(op, **keywords):
    x, call = OPS[op]
    x = x.clone().requires_grad_()
    out = call(x, **keywords)
    out.loss.backward()
    return out, x.grad


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("op", OPS)
def test_an_error_names_the_place(op, case):  # docs/semantics.md: S6
    keywords, message = MALFORMED[case]
    with pytest.raises(rw.InvalidCall, match=message):
        result(op, **keywords)


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("op", OPS)
# docs/semantics.md: S6
def test_unread_it_is_nan_and_with_validate_an_error(op, case, unread):
    keywords, message = MALFORMED[case]
    out, grad = result(op, **keywords)
    assert out.loss.isnan() and grad[grad != 0].isnan().all()
    assert grad.isnan().any() or case == "descending"  # no offset there leaves a row in
    with pytest.raises(rw.InvalidCall, match=message):
        result(op, **keywords, validate=True)


@pytest.mark.parametrize("case", FINE)
@pytest.mark.parametrize("op", OPS)
def test_what_can_be_meant_is_the_same_read_or_not(op, case, monkeypatch):
    keywords = FINE[case]
    out, grad = result(op, **keywords)
    for module in (structure, rows, grouped, hidden):
        monkeypatch.setattr(module, "is_readable", lambda t: False)
    unread, unread_grad = result(op, **keywords)
    assert (
        out.loss.isfinite()
        and torch.equal(out.loss, unread.loss)
        and torch.equal(grad, unread_grad)
    )


def test_what_depends_on_sequences_is_nan_and_what_does_not_is_not(unread):
    out, _ = result("policy_loss, sequence ratio", cu_seqlens=torch.tensor([0, 8, 5]))
    assert out.per_token_logps.isfinite().all() and out.ratio[out.ratio != 0].isnan().all()
    out, _ = result("policy_loss, sequence advantages", cu_seqlens=torch.tensor([0, 8, 5]))
    assert out.per_token_loss[out.per_token_loss != 0].isnan().all()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_plan_and_backend(plan, backend, unread):
    out, grad = result(
        "policy_loss", plan=plan, backend=backend, cu_seqlens=torch.tensor([0, 8, 5])
    )
    assert out.loss.isnan() and grad[grad != 0].isnan().all() and grad.isnan().any()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_in_a_graph(plan):
    def step(x, cu):
        return rw.policy_loss(x, IDS, 1.0, spec="dapo", cu_seqlens=cu, plan=plan, **POLICY).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    x = LOGITS.clone().requires_grad_()
    torch.testing.assert_close(
        compiled(x, torch.tensor([0, 4, 10])), step(x, torch.tensor([0, 4, 10]))
    )
    assert compiled(x, torch.tensor([0, 8, 5])).isnan()


@pytest.mark.parametrize("keywords", [k for k, _ in MALFORMED.values()])
def test_nothing_is_read_of_a_device(keywords):
    """Meta tensors have no values: code that reads one fails."""
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    old = OLD.to("meta")
    why = rw.explain(
        rw.policy_loss,
        LOGITS.to("meta"),
        IDS.to("meta"),
        1.0,
        spec="gspo",
        old_per_token_logps=old,
        device="cuda",
        **on_meta,
    )
    assert why.plan == "two_pass"


WRONG = {
    "float ids": (dict(sequence_ids=OUTSIDE.clamp(max=1).float(), num_sequences=2), "sequence_ids must be int32 or int64, got torch.float32"),
    "bool ids": (dict(sequence_ids=OUTSIDE == 1, num_sequences=2), "sequence_ids must be int32 or int64, got torch.bool"),
    "ids a list": (dict(sequence_ids=[0] * 10, num_sequences=2), "sequence_ids must be int32 or int64, got a list"),
    "offsets a list": (dict(cu_seqlens=[0, 10]), "cu_seqlens must be int32 or int64, got a list"),
    "offsets elsewhere": (dict(cu_seqlens=torch.zeros(3, dtype=torch.int32, device="meta")), "cu_seqlens is on meta, the rows are on cpu"),
    "count a float": (dict(sequence_ids=OUTSIDE, num_sequences=2.0), "num_sequences is 2.0, expected an int"),
    "count True": (dict(sequence_ids=OUTSIDE, num_sequences=True), "num_sequences is True, expected an int"),
    "count negative": (dict(sequence_ids=OUTSIDE, num_sequences=-1), "num_sequences is -1, expected an int"),
    "count a tensor": (dict(sequence_ids=OUTSIDE, num_sequences=torch.tensor(2)), r"num_sequences is tensor\(2\), expected an int"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("op", ["policy_loss", "policy_loss_from_logps", "preference_loss"])
def test_what_is_no_index(op, name):
    keywords, message = WRONG[name]
    with pytest.raises(rw.InvalidCall, match=message):
        result(op, **keywords)


@pytest.mark.parametrize("count, times", [("nonempty", 1), ("all", 50)])
def test_empty_sequences_only_count(count, times):
    """More sequences than rows are usual: on a rank of ``sequence_group``, or where a
    micro-batch has the ids of a whole batch.
    """
    spec = rw.methods.gspo().replace(reduction=rw.SequenceMean(count=count))
    ids = OUTSIDE.clamp(max=1)
    out, grad = result("policy_loss", spec=spec, sequence_ids=ids, num_sequences=2)
    more, more_grad = result("policy_loss", spec=spec, sequence_ids=90 * ids, num_sequences=100)
    torch.testing.assert_close(times * more.loss, out.loss)
    torch.testing.assert_close(times * more_grad, grad)


def test_empty_groups_change_nothing():
    """The ids of a data set's prompts, of which a micro-batch has two."""
    ids = torch.tensor([0, 0, 1, 1])
    assert torch.equal(contrast(LOGITS, 90 * ids, 100).loss, contrast(LOGITS, ids).loss)
    rewards = REWARDS[:, 0]
    few, many = (adv.grpo(rewards, group_ids=k * ids, num_groups=n) for k, n in ((1, 2), (90, 100)))
    assert torch.equal(few, many) and few.any()


def test_segments():
    spec = rw.methods.gspo().replace(ratio=rw.SegmentRatio())
    for wrong, message in (
        (OUTSIDE.double(), "segment_ids must be int32 or int64, got torch.float64"),
        (3, "got a int"),
    ):
        with pytest.raises(rw.InvalidCall, match=message):
            policy(LOGITS, spec=spec, segment_ids=wrong, cu_seqlens=torch.tensor([0, 4, 10]))


CONTRAST = dict(spec=rw.methods.disco(), cu_seqlens=torch.tensor([0, 3, 5, 8, 10]))
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]


def contrast(x, ids, count=2, **keywords):
    return rw.policy_loss(
        x, IDS, REWARDS, group_ids=ids, num_groups=count, **{**CONTRAST, **POLICY, **keywords}
    )


def test_groups_of_a_contrast(monkeypatch):
    x = LOGITS.clone().requires_grad_()
    bad = torch.tensor([0, 0, 1, 4])
    fine = contrast(x, bad.clamp(max=1)).loss
    message = r"group_ids\[3\] \(flat\) is 4, outside \[0, num_groups = 2\)"
    with pytest.raises(rw.InvalidCall, match=message):
        contrast(x, bad)
    with pytest.raises(rw.InvalidCall, match="group_ids must be int32 or int64, got torch.float32"):
        contrast(x, bad.float())
    with pytest.raises(rw.InvalidCall, match="num_groups is 2.0, expected an int"):
        contrast(x, bad, 2.0)
    for module in (structure, rows):
        monkeypatch.setattr(module, "is_readable", lambda t: False)
    assert torch.equal(contrast(x, bad.clamp(max=1)).loss, fine)
    with pytest.raises(rw.InvalidCall, match=message):
        contrast(x, bad, validate=True)
    loss = contrast(x, bad).loss
    loss.backward()
    assert loss.isnan() and x.grad.isnan().any()


ROWS = {
    "outside": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 12], r"row_index\[9\] is 12"),
    "negative": ([0, 1, 2, 3, 4, 5, 6, 7, 8, -1], r"row_index\[9\] is -1"),
    "twice": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9], "names row 9 more than once"),
    "missing": ([0, 1, 2, 3, 4, 5, 6, 7, 8], "leaves out row 9"),
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", ROWS)
def test_row_index(name, plan, monkeypatch):
    index, message = ROWS[name]

    def call(index, **k):
        x = HIDDEN.clone().requires_grad_()
        out = rw.linear_policy_loss(
            x,
            HEAD,
            IDS,
            1.0,
            spec="dapo",
            plan=plan,
            row_index=torch.tensor(index),
            compact_rows=False,
            **POLICY,
            **k,
        )
        out.loss.backward()
        return out.loss, x.grad

    fine = call(list(range(N)))
    with pytest.raises(rw.InvalidCall, match=message):
        call(index)
    for module in (structure, rows, hidden):
        monkeypatch.setattr(module, "is_readable", lambda t: False)
    assert all(torch.equal(a, b) for a, b in zip(call(list(range(N))), fine, strict=True))
    loss, grad = call(index)
    assert loss.isnan() and grad[grad != 0].isnan().all() and grad.isnan().any()
    with pytest.raises(rw.InvalidCall, match=message):
        call(index, validate=True)


def test_row_index_of_log_probs(unread):
    logps = rw.linear_token_logps(
        HIDDEN, HEAD, IDS, row_index=torch.tensor([0, 1, 99]), completion_mask=torch.arange(N) < 3
    )
    assert logps[:3].isnan().all() and torch.equal(logps[3:], torch.zeros(N - 3))


B = 6
R = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 4.0])
EPISODES, STATES = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0, 0, 0, 0, 1, 1])
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2])
MASK = torch.ones(2, 4)


def with_one(index, at, value):
    changed = index.clone()
    changed[at] = value
    return changed


def gigpo(episodes=EPISODES, states=STATES, **keywords):
    return adv.gigpo(
        R, R.flip(0), episodes, states, **{"num_anchors": 2, "group_size": 3, **keywords}
    )


def chain(ids, cuts):
    return adv.spo_chain(torch.ones(2, 2), torch.ones(2), adv.SpoSegments(ids, cuts), MASK)


SEGMENTS, CUTS = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]]), torch.tensor([2, 1])
IDS_OF = {"group_ids": torch.tensor([0, 0, 0, 1, 1, 1]), "num_groups": 2}
#: A call, its message where values are read, and the rows that are NaN where they are
#: not.
INDICES = {
    "episode above": (lambda: gigpo(with_one(EPISODES, 2, 6)), r"gigpo: episode_ids\[2\] is 6, outside \[0, the number of episodes=6\)", [2]),
    "episode below": (lambda: gigpo(with_one(EPISODES, 2, -1)), r"gigpo: episode_ids\[2\] is -1", [2]),
    "anchor above": (lambda: gigpo(states=with_one(STATES, 1, 2)), r"gigpo: anchor_ids\[1\] is 2, outside \[0, num_anchors=2\)", [1]),
    "parent above": (lambda: adv.spo_tree(R, with_one(PARENTS, 5, 6)), r"spo_tree: parents\[5\] is 6, outside \[-1, the number of rows=6\)", [5]),
    "parent below": (lambda: adv.spo_tree(R, with_one(PARENTS, 5, -2)), r"spo_tree: parents\[5\] is -2", [5]),
    "parent of itself": (lambda: adv.spo_tree(R, with_one(PARENTS, 4, 4)), r"spo_tree: parents\[4\] is 4, and node 4 is among the ancestors", [4]),
    "cycle of parents": (lambda: adv.spo_tree(R, with_one(PARENTS, 1, 4)), r"spo_tree: parents\[[14]\] is [14], and node", [1, 3, 4]),
    "cycle of parents, std": (lambda: adv.spo_tree(R, with_one(PARENTS, 2, 5), scale="std"), r"spo_tree: parents\[[25]\] is [25], and node", [2, 5]),
    "cuts": (lambda: chain(SEGMENTS, torch.tensor([2, 3])), r"spo_chain: segments.cuts\[1\] is 3", [1]),
    "segment": (lambda: chain(with_one(SEGMENTS, (1, 2), -4), CUTS), r"spo_chain: segments.segment_ids\[1, 2\] is -4", [1]),
    "segment behind the last cut": (lambda: chain(with_one(SEGMENTS, (1, 2), 2), CUTS), "spo_chain: a token is in a segment after its row's last cut", [1]),
    "source": (lambda: rw.sample_weights.source_weights(torch.zeros(2), torch.tensor([0, 1, 2])), r"source_ids\[2\] is 2", [2]),
    "tw_grpo": (lambda: rw.weights.tw_grpo(torch.randn(6, 2, 3), torch.ones(6, 2), **{**IDS_OF, "group_ids": with_one(IDS_OF["group_ids"], 4, 2)}), r"tw_grpo: group_ids\[4\] is 2", [4]),
    "gtpo": (lambda: rw.weights.gtpo(torch.rand(6, 2), R > 0, torch.ones(6, 2), **{**IDS_OF, "group_ids": with_one(IDS_OF["group_ids"], 4, 2)}), r"gtpo: group_ids\[4\] is 2", [4]),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_rewards(name, monkeypatch):
    call, message, wrong = INDICES[name]
    with pytest.raises(rw.InvalidCall, match=message):
        call()
    for module in (structure, grouped, segments):
        monkeypatch.setattr(module, "is_readable", lambda t: False)
    found = call()
    nan = found.isnan() if found.dim() == 1 else found.isnan().any(1)
    assert nan.nonzero()[:, 0].tolist() == wrong


def test_a_step_of_no_episode_is_in_no_state(monkeypatch):
    """Its return moves no other step's advantage."""
    without = gigpo(states=torch.tensor([0, 0, 1, 0, 1, 1]))
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    monkeypatch.setattr(grouped, "is_readable", lambda t: False)
    found = gigpo(with_one(EPISODES, 2, 9))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], without[others])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gigpo(EPISODES == 1), "episode_ids must be an int32 or int64"),
        (lambda: gigpo(states=STATES.float()), "anchor_ids must be an int32 or int64"),
        (lambda: gigpo(num_anchors=2.0), "num_anchors is 2.0, expected a whole number"),
        (lambda: adv.spo_tree(R, PARENTS.float()), "parents must be an int32 or int64"),
        (lambda: chain(SEGMENTS.float(), CUTS), "segments.segment_ids must be an int32 or int64"),
        (lambda: chain(SEGMENTS, CUTS.bool()), "segments.cuts must be an int32 or int64"),
        (lambda: adv.grpo(R, group_size=True), "group_size is True"),
        (
            lambda: rw.weights.gtpo(torch.rand(6, 2), R > 0, torch.ones(6, 2), group_size=2.0),
            "group_size is 2.0, expected a whole number",
        ),
        (
            lambda: rw.weights.gtpo(
                torch.rand(6, 2), R > 0, torch.ones(6, 2), group_ids=R, num_groups=5
            ),
            "group_ids must be an int32 or int64",
        ),
    ],
)
def test_what_is_no_index_of_rewards(call, message):
    with pytest.raises(rw.InvalidCall, match=message):
        call()


def test_no_row_at_all():
    out = rw.policy_loss(
        torch.zeros(0, V),
        torch.zeros(0, dtype=torch.long),
        1.0,
        spec="grpo",
        cu_seqlens=torch.tensor([0, 0]),
    )
    assert out.loss == 0 and not math.isnan(out.loss)
