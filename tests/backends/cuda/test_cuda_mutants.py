"""Tests of the tests: the tests of the emulated kernels must find every planted bug.
And sanitizers.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import SANITIZE, build, compiler
from paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels"),
]

STREAMING, RING, DIVERGENCE, SURE = (
    "test_cuda_emulated.py",
    "test_cuda_ring.py",
    "test_cuda_divergence.py",
    "test_cuda_sure.py",
)
SCALE, PROGRAM, SPLIT = "test_cuda_scale.py", "test_cuda_program.py", "test_cuda_split_rows.py"
IDS = "test_cuda_top_ids.py"

#: name: (file, text, text with the bug). Bugs of the streaming kernel, of code that
#: both kernels share, and of the choice between them.
MUTANTS = {
    "no barrier before the block's merge": ("streaming.cu", "    barrier();\n    Partial sums{", "    Partial sums{"),
    "no second set of partial sums": ("streaming.cu", "        buffer ^= 1;\n        if (thread_index() == 0) put_row", "        if (thread_index() == 0) put_row"),
    "no barrier before the gradient": ("streaming.cu", "        barrier();\n        write_gradient<T, kFull, kUnroll>", "        write_gradient<T, kFull, kUnroll>"),
    "no barrier before a known gradient": ("streaming.cu", "        barrier();  // this row is ready, and no thread reads the preceding one any more\n", ""),
    "no second row of constants": ("streaming.cu", "prepare(i + block_count(), buffer ^ 1);", "prepare(i + block_count(), buffer);"),
    "the constants of a row ahead forgotten": ("streaming.cu", "        prepare(i + block_count(), buffer ^ 1);\n", ""),
    "the constants of the first row forgotten": ("streaming.cu", "    prepare(block_index(), buffer);\n", ""),
    "an ignored row reads logits": ("streaming.cu", "if (is_invalid(call, i)) return {out, out, -1, {}};", "if (is_invalid(call, i) && call.ids[i] > 0) return {out, out, -1, {}};"),
    "the gradient of the row before": ("streaming.cu", "kUnroll>(known[buffer],", "kUnroll>(known[buffer ^ 1],"),
    "entropy sum not rebased": ("statistics.h", "factor * fmaf(shift, s.sum, s.dot)", "factor * s.dot"),
    "sum of squares rebased once": ("statistics.h", "s.sum_sq *= factor * factor", "s.sum_sq *= factor"),
    "no bound of a reference": ("statistics.h", "fminf(fmaxf(top * scale, -5.36870912e8f), 5.36870912e8f)", "top * scale"),
    "0 * -inf in the entropy": ("statistics.h", "dot = fmaf(e, kBounded ? t : fmaxf(t, kFloor), dot)", "dot = fmaf(e, t, dot)"),
    "0 * -inf in the gradient": ("gradient.h", "fmaf(kBounded ? t : fmaxf(t, kFloor), g.log, g.constant)", "fmaf(t, g.log, g.constant)"),
    "last columns forgotten": ("statistics.h", "return tail < columns ? tail : -1;", "return tail + 1 < columns ? tail : -1;"),
    "a vector too many": ("streaming.cu", "if (i + u * kThreads < vectors) v[u]", "if (i + u * kThreads <= vectors) v[u]"),
    "a slice ends a vector early": ("slices.h", "return begin(slice + 1);", "return begin(slice + 1) - (slice + 1 < count);"),
    "the last slice forgotten": ("streaming.cu", "for (int slice = 0; slice < slices.count; ++slice) sums", "for (int slice = 0; slice + (slices.count > 1) < slices.count; ++slice) sums"),
    "gradient starts a step late": ("gradient.h", "for (int at = whole - kStep +", "for (int at = whole - 2 * kStep +"),
    "target written by another thread": ("gradient.h", "division.owner<T>(row.target) == thread_index()", "(division.owner<T>(row.target) ^ 1) == thread_index()"),
    "target by its rounded probability": ("../common/derivatives.h", "d_logp * std::expm1(y)", "d_logp * (std::exp(y) - 1)"),
    "target capped in fp32": ("partial.h", "exact = softcap.exactly(x, slope);", "softcap.exactly(x, slope), exact = double(swept);"),
    "softcap without slope": ("gradient.h", "fmaf(e, g.p_coef, factor) * slope", "fmaf(e, g.p_coef, factor)"),
    "softcap makes -inf finite": ("partial.h", "if (fabsf(x) != kInf) x = cap * r", "x = cap * r"),
    "padding not cleared": ("gradient.h", "column < columns; column += kThreads", "column < vocab; column += kThreads"),
    "32-bit offsets": ("../common/primitives.h", "return (i / per_batch) * batch_stride", "return int32_t((i % per_batch) * row_stride) + (i / per_batch) * batch_stride; return (i / per_batch) * batch_stride"),
    "one temperature for all": ("../common/primitives.h", "call.temperature_per_row ? i : 0", "0"),
    "ignored rows are swept": ("../common/primitives.h", "return call.ids[i] < 0 ||", "return"),
    "shards ignored": ("../common/row_view.h", "id - call.vocab_start", "id"),
    "zero-gradient rows are swept": ("gradient.h", "    if (d.all_zero()) return g;\n", ""),
    "NaN rows get numbers": ("gradient.h", "    if (from.rest != from.rest) {", "    if (false) {"),
    "columns at any address from the block before": ("elements.h", "load16_cached(blocks + i), b = load16_cached(blocks + i + 1)", "load16_cached(blocks + i - 1), b = load16_cached(blocks + i)"),
    "eight bytes not skipped": ("elements.h", "w[j] = w[j + 2];", "w[j] = w[j];"),
    "four bytes not skipped": ("elements.h", "w[j] = w[j + 1];", "w[j] = w[j];"),
    "columns before the first vector forgotten": ("gradient.h", "    if (thread_index() < columns.head) write(thread_index());\n", ""),
    "logits taken for aligned as the gradient is": ("gradient.h", "!reads || off(x) == off(out) ? (vocab", "true ? (vocab"),
    "the words of a pair swapped": ("elements.h", "narrow_pair<T>(x[2 * j], x[2 * j + 1])", "narrow_pair<T>(x[2 * j + 1], x[2 * j])"),
    "one set of partial sums of packed rows": ("streaming.cu", "        buffer ^= 1;  // the others begin the next row while warp 0 merges\n", ""),
    "no barrier before a packed gradient": ("streaming.cu", "        barrier();  // the row is ready\n", ""),
    "no barrier after a packed gradient": ("streaming.cu", "        barrier();  // no thread reads it any more\n", ""),
    "packed rows of one length": ("../common/primitives.h", "call.bounds[call.rows + i] - call.bounds[i] : call", "call.bounds[call.rows] - call.bounds[0] : call"),
    "the scale's rounding ignored": ("partial.h", "rounding / kLog2e * mean * kLn2", "0.0"),
}  # fmt: skip
WALK = "for (int from = 0; from < slice.slices.count; ++from) sums = merge(sums, as_partial(load_shared(&stage.sent[from].sums)), row.scale);"

#: Bugs of the ring kernel: its waits, its pipeline, its slices, its target.
RING_MUTANTS = {
    "gradient stored before it is there": ("ring.cu", "        wait(ring.empty(out.state.index), out.state.phase);\n", ""),
    "loaded while it is stored": ("ring.cu", "            wait_group_read<kStoresInFlight>();\n", ""),
    "the wrong tile loaded": ("ring.cu", "if (stored >= kStoresInFlight) load_next(in);", "load_next(in);"),
    "the block ends before its stores": ("ring.cu", "    if constexpr (!kDirect) wait_group<0>();\n", ""),
    "logits read before they are there": ("ring.cu", "        wait(ring.full(tile.index), tile.phase);\n        const Vector*", "        const Vector*"),
    "the last logits read before they are there": ("ring.cu", "    wait(ring.full(tile.index), tile.phase);\n    const Vector*", "    const Vector*"),
    "no proxy fence": ("ring.cu", "release_written(ring.empty(tile.index));", "release(ring.empty(tile.index));"),
    "no barrier of the warp": ("ring.cu", "release_written(ring.empty(tile.index));", "emulation::proxy_fence();\n            if (thread_index() % 32 == 0) arrive(ring.empty(tile.index));"),
    "no barrier after the initialization": ("ring.cu", "    cluster_barrier();\n", ""),
    "the warps' sums not waited for": ("ring.cu", "        wait(stage.partials_full, state.phase);\n", ""),
    "slice sums not waited for": ("ring.cu", "            wait_for_cluster(stage.cluster_full, state.phase);\n", ""),
    "constants not waited for": ("ring.cu", "    wait(stage.gradient_full, at.phase);\n", ""),
    "one slice not expected": ("ring.cu", "slice.slices.count * int(sizeof(SlicePartial))", "slice.slices.count * int(sizeof(SlicePartial)) - 16"),
    "an arrival for each thread": ("ring.h", "initialize(empty(i), kWarps)", "initialize(empty(i), kThreads)"),
    "an arrival too few": ("ring.h", "initialize(stage(i).partials_full, kWarps)", "initialize(stage(i).partials_full, kWarps - 1)"),
    "the phase never turns": ("ring.h", "        phase ^= 1;\n", ""),
    "one stage for rows": ("ring.h", "constexpr int kStages = kRowsAhead + 1;", "constexpr int kStages = kRowsAhead;"),
    "slice sums to one place": ("ring.cu", "&stage.sent[slice.rank].sums", "&stage.sent[0].sums"),
    "slice sums to oneself": ("ring.cu", "stage.cluster_full, lane);\n            send({as_bits", "stage.cluster_full, slice.rank);\n            send({as_bits"),
    "the target read when it may be overwritten": ("ring.cu", "Target(as_float(load_shared(&stage.sent[owner].target).words[0]), softcap)", "Target(widen(row.x[row.target]), softcap)"),
    "the target's owner by its column alone": ("ring.cu", "vector < slice.slices.vectors ? vector / slice.slices.each : slice.slices.count - 1", "vector / slice.slices.each"),
    "the target in the first slice's columns": ("ring.cu", "in_slice = out.target - slice.begin * n;", "in_slice = out.target;"),
    "the target in the first tile": ("ring.cu", "const int at = in_slice - t * (kTileVectors * n);", "const int at = in_slice;"),
    "the target written by another thread": ("ring.cu", "in_slice / n % kThreads == thread_index()", "(in_slice / n % kThreads ^ 1) == thread_index()"),
    "the target of another row": ("ring.cu", "            stage.target = row.target;\n", "            stage.target = i == 0 ? row.target : stage.target;\n"),
    "slices that overlap": ("ring.h", "begin = slices.begin(rank);", "begin = slices.begin(rank) - (rank > 0);"),
    "slices added in reverse": ("ring.cu", WALK, WALK.replace("[from]", "[slice.slices.count - 1 - from]")),
    "the last tile stored whole": ("ring.cu", "ring.tile(out.state.index), slice.tile_vectors(out.tile) * 16, stores", "ring.tile(out.state.index), kTileBytes, stores"),
    "columns after the last vector forgotten": ("ring.cu", "    if (has_tail) absorb_tail<T, kSums>", "    if (false) absorb_tail<T, kSums>"),
    "columns after the last vector added by every block": ("ring.cu", "const bool has_tail = slice.is_last() && vocab %", "const bool has_tail = vocab %"),
    "columns after the last vector written twice": ("ring.cu", "const bool has_tail = last && slice.is_last() &&", "const bool has_tail = slice.is_last() &&"),
    "zeros of skipped rows forgotten": ("ring.cu", "[&](int64_t i) { write_zeros<T>(call, slice, i); }", "[](int64_t) {}"),
    "skipped rows are loaded": ("ring.h", "        rows.advance(call, [](int64_t) {});\n", "        rows.now.row += rows.step;\n"),
    "a row of the next cluster": ("ring.h", "first = cluster;", "first = 0;"),
    "a deadlock by one tile": ("ring.h", "const int room = ring_tiles - kStoresInFlight - tiles;", "const int room = ring_tiles - tiles;"),
    "a whole row ahead in too few tiles": ("ring.h", "ahead = room < tiles ? room : tiles;", "ahead = tiles;"),
    "a tile of the gradient too many kept": ("ring.h", "kept = kKeep || ahead == tiles ? ahead : 0;", "kept = ahead < tiles ? ahead + 1 : ahead;"),
    "a tile of the gradient forgotten": ("ring.cu", "half ? at_once : 0, half ? slice.tiles : at_once, half, written", "half ? at_once : 0, half ? slice.tiles : at_once - (at_once > 1), half, written"),
    "a stale prefetched row": ("ring.h", "        next = Peek(call, now.row + step, end);\n        settle", "        next.row = now.row + step;\n        settle"),
    "the id of a row after a skipped one is stale": ("ring.h", "            next = Peek(call, now.row + step, end);\n        }\n    }\n};", "            next.row = now.row + step;\n        }\n    }\n};"),
    "the next row's sums in this one's stage": ("ring.cu", "            sums_stage.advance(kStages);\n", ""),
    "a ring that holds a row and nothing of the next": ("dispatch.cpp", "slices.tiles() + 1 + kStoresInFlight; needed > p.tiles", "slices.tiles() + kStoresInFlight; needed > p.tiles"),
    "strides between batches not looked at": ("dispatch.h", "(call.rows <= strides.per_batch || whole(strides.batch_stride))", "true"),
    "the gradient's address not looked at": ("dispatch.cpp", "} else if (!rows_are_aligned(call.out, call.out_strides, call)) {", "} else if (false) {"),
    "the device's memory not looked at": ("dispatch.cpp", "(device.shared_bytes - kBytesBesides) / kBytesPerTile", "14"),
}  # fmt: skip

#: Bugs of the sums next to a sure token, and of logits far from zero, in both kernels.
SURE_MUTANTS = {
    "sure: a lost rest": ("partial.h", "fmaf(e, l.rest, w.rest) + e", "w.rest + e"),
    "sure: nothing summed again": ("statistics.h", "fabsf(merged.top) < kInf : merged.rest < kRoundedAway", "fabsf(merged.top) < kInf : false"),
    "sure: summed again only where all is lost": ("statistics.h", "kRoundedAway = 0x1p-10f", "kRoundedAway = 0x1p-24f"),
    "sure: every lane sums for the first": ("statistics.h", "const int lane = lowest_bit(todo);", "const int lane = 0;"),
    "sure: the largest counted again": ("statistics.h", "return {top, (tops - 1.0f) + rest,", "return {top, tops + rest,"),
    "sure: the last column not summed again": ("streaming.cu", "            if (tail >= 0) f(widen(x[tail]));\n", ""),
    "sure: the last column not summed again in the ring": ("ring.cu", "        if (tail >= 0) f(widen(x[tail]));\n", ""),
    "sure: summed again from another row's tiles": ("ring.cu", "const int tile = first + vector / kTileVectors;", "const int tile = vector / kTileVectors;"),
    "sure: a tile beyond the ring": ("ring.cu", "tile < ring.tiles ? tile : tile - ring.tiles", "tile"),
    "sure: a log-prob by the rounded sum": ("partial.h", "return x < 1.0f ? double(log1pf(x)) :", "return"),
    "far: sums by the rounded reference": ("statistics.h", "Partial out{s.top, rest * back, back * fmaf(-t, rest, fmaf(-e, t, s.dot)), 0.0f};", "Partial out{s.top, rest, s.dot, 0.0f};"),
    "far: the top's exponent taken for 0": ("row.h", "return {true, base, whole - t, inverse * (1.0f + expm1f(-t * kLn2f))};", "return {true, base, whole, inverse};"),
    "far: exponents relative to a product": ("statistics.h", "constexpr float kFar = 131072.0f;", "constexpr float kFar = 1e38f;"),
    "far: a gradient relative to a product": ("gradient.h", "!from.near ? Terms::far :", "false ? Terms::far :"),
    "far: lse in fp64": ("../common/row_stats.h", "return has_target && std::fabs(lse) > kLargestLse && logp > kLeastLogp;", "return false;"),
    "a log-sum-exp without its low part": ("streaming.cu", "low = get(call.lse_low)", "low = 0.0"),
}  # fmt: skip

#: Bugs of the kernel on two logits tensors.
DIVERGENCE_MUTANTS = {
    f"divergence: {name}": ("divergence.cu", text, bug)
    for name, text, bug in (
        # columns, groups and rows
        ("a column after the last group forgotten", "slice == slices.count - 1 && tail < columns", "slice == slices.count - 1 && tail + 1 < columns"),
        ("a gradient after the last group forgotten", "column = part.head + part.to * kColumns + thread_index();", "column = part.head + part.to * kColumns + thread_index() + 1;"),
        ("a gradient before the first group forgotten", "if (part.first && thread_index() < part.head) write", "if (part.first && thread_index() + 1 < part.head) write"),
        ("a group too many", "if (i >= end) continue;\n        float a", "if (i > end) continue;\n        float a"),
        ("a group not loaded", "if (i >= end) continue;\n        of_x", "if (i + 1 >= end) continue;\n        of_x"),
        ("gradient starts a step late", "(part.to - part.from - 1) / kStep * kStep", "(part.to - part.from) / kStep * kStep - kStep"),
        ("the second's rows by the first's strides", "row_of<U>(call.q, i)", "static_cast<const U*>(call.q.logits) + call.strides.offset(i)"),
        ("the first's rows in 32 bits", "row_of<T>(call, i)", "static_cast<const T*>(call.logits) + int32_t(call.strides.offset(i))"),
        ("the second's rows in 32 bits", "row_of<U>(call.q, i)", "static_cast<const U*>(call.q.logits) + int32_t(call.q.strides.offset(i))"),
        ("the gradient's rows in 32 bits", "+ call.out_strides.offset(i)", "+ int32_t(call.out_strides.offset(i))"),
        ("the second's dtype", "case DType::f16: return of(F16())", "case DType::f16: return of(Bf16())"),
        # alignment
        ("the second's alignment not looked at", "is_aligned(row.x) && is_aligned(row.y)", "is_aligned(row.x)"),
        ("the first's alignment not looked at", "is_aligned(row.x) && is_aligned(row.y)", "is_aligned(row.y)"),
        ("the second's alignment not looked at in the gradient", "is_aligned(row.x + part.head) && is_aligned(row.y + part.head)", "is_aligned(row.x + part.head)"),
        ("the first's alignment not looked at in the gradient", "is_aligned(row.x + part.head) && is_aligned(row.y + part.head)", "is_aligned(row.y + part.head)"),
        ("the gradient's alignment not looked at", "head = (16 - int(", "head = 0 * (16 - int("),
        ("a group of the row's first columns", "y(row.y + part.head, columns - part.head)", "y(row.y, columns)"),
        ("a fill at any address", "begin = from + ahead < to ? from + ahead : to", "begin = from"),
        ("the first columns of a fill forgotten", "    for (int i = from + thread_index(); i < begin; i += kThreads) narrow(value, out[i]);\n", ""),
        ("the last columns of a fill forgotten", "    for (int i = begin + vectors * kPerVector<T> + thread_index(); i < to; i += kThreads) narrow(value, out[i]);\n", ""),
        # ignored rows, padding, rows without coefficients
        ("ignored rows are swept", "if (is_ignored(call, i)) {", "if (false) {"),
        ("the table of ignored rows forgotten", "    if (call.table && begin == 0 && thread_index() == 0) put_column(call.table, call.rows, i, {});\n", ""),
        ("padding of ignored rows forgotten", "end == slices.count ? int(call.columns) :", "end == slices.count ? int(call.vocab_size) :"),
        ("padding not cleared", "    if (part.last) fill(out, columns, int(call.columns), 0.0f);\n", ""),
        ("rows without coefficients are swept", "const bool none = forward == 0 && reverse == 0 && entropy == 0;", "const bool none = false;"),
        ("the first row's weight", "call.weights[i]", "call.weights[0]"),
        ("a coefficient of another row", "c[call.rows], c[2", "c[0], c[2"),
        # temperature and soft cap
        ("the first's temperature for both", "kLog2ef / q_temperature", "kLog2ef / p_temperature"),
        ("the first's temperature for the second's center", "q(v[6], v[7], row.q_temperature,", "q(v[6], v[7], row.p_temperature,"),
        ("one temperature of the second", "temperature_of(call.q, i)", "temperature_of(call.q, 0)"),
        ("a gradient not by temperature", "other = q_factor * forward / t", "other = q_factor * forward"),
        ("soft caps swapped", "p_cap(call.softcap), q_cap(call.q.softcap)", "p_cap(call.q.softcap), q_cap(call.softcap)"),
        ("the second's soft cap alone forgotten", "call.softcap < kInf || call.q.softcap < kInf", "call.softcap < kInf"),
        ("the second's soft cap forgotten in the gradient", "        if (q_cap.on) q_cap.apply(y);\n", ""),
        ("soft cap without slope", ") * slope;  // two", ");  // two"),
        # signs and constants
        ("the ratio the other way", "a - fmaxf(b, -1e30f)", "fmaxf(b, -1e30f) - a"),
        ("a log-sum-exp without its low part", "double(lse) + double(low)", "double(lse)"),
        ("the center's rounding ignored", "return 1.0f + expm1f(rest * kLn2f);", "return 1.0f;"),
        # slices, barriers and messages
        ("no barrier before the block's merge", "            if (!call.split) barrier();\n", ""),
        ("no barrier before the gradient", "            barrier();\n            const Gradient g", "            const Gradient g"),
        ("no second set of sums and constants", "        buffer ^= 1;\n", ""),
        # sure tokens
        ("nothing summed again", "if (!(merged.sum < kRoundedAway) || merged.top == -kInf) return;", "return;"),
        ("the second tensor not summed again", "    sum_again<U, kCapped>(s.q, merged.q, row.y, columns, slices, slice, row.scales.q, q_cap);\n", ""),
        ("the last column not summed again", "if (tail < columns && slice == slices.count - 1 && lane == 0) f(widen(x[tail]));", "(void)tail;"),
        ("the first's scale in the second's sums again", "slice, row.scales.q, q_cap", "slice, row.scales.p, q_cap"),
        ("the first's soft cap in the second's sums again", "slice, row.scales.q, q_cap", "slice, row.scales.q, p_cap"),
        ("no soft cap in sums again", "kCapped ? Sums::full : Sums::entropy", "Sums::entropy"),
        ("every lane sums for the first", "lowest_bit(leaders(own, merged.top))", "0"),
        ("the logarithm of a rounded sum", "log1p_of(u.sum)", "log2_of(1.0f + u.sum) * kLn2"),
        # -inf
        ("a gradient of -inf", "    if (x == -kInf) return 0.0f;\n", ""),
        ("0 * -inf in the gradient", "fmaxf((x - g.p_center) * scales.p, -200.0f)", "(x - g.p_center) * scales.p"),
        ("no bound of a ratio", "a - fmaxf(b, -1e30f)", "a - b"),
        ("numbers for an infinite divergence", " || (reverse != 0 && !(fabsf(v[1]) < kInf))", ""),
    )
} | {
    f"divergence: {name}": ("divergence_sums.h", text, bug)
    for name, text, bug in (
        ("the difference's sign", "fmaf(f, -d, q.cross)", "fmaf(f, d, q.cross)"),
        ("differences rebased by the own shift alone", "fmaf(shift - others_shift, s.sum, s.cross)", "fmaf(shift, s.sum, s.cross)"),
        ("entropy sum not rebased", "factor * fmaf(shift, s.sum, s.dot)", "factor * s.dot"),
        ("no bound of a shift", "fmaxf((from - to) * scale, -1e30f)", "(from - to) * scale"),
        ("half a warp's sums", "    for (int lanes = 16; lanes; lanes /= 2) {\n        add(s.p", "    for (int lanes = 8; lanes; lanes /= 2) {\n        add(s.p"),
        ("half a warp's maximum", "    for (int lanes = 16; lanes; lanes /= 2) {\n        p_top", "    for (int lanes = 8; lanes; lanes /= 2) {\n        p_top"),
        ("sums relative to each lane's maximum", "    rebase_merged(s, p_top, q_top, scales);\n    const auto add = [](Side& x", "    const auto add = [](Side& x"),
        ("the later half of the slices forgotten", "if (slice + kHalf < slices) s = merge", "if (slice + kHalf < slices && false) s = merge"),
        ("a largest column counted", "    if (p.top == p_top) s.p.sum = p.sum;\n", ""),
        ("several largest columns left out", "    if (p_leaders > 1) s.p.sum += float(p_leaders - 1);\n", ""),
        ("a zero lost between lanes", "        s.p_zero = fmaxf(s.p_zero, shuffle_xor(s.p_zero, lanes));\n", ""),
        # -inf
        ("no guard for -inf", "return top == -kInf ? 0.0f : top;", "return top;"),
        ("0 * -inf in the entropy", "fmaf(e, p_masked ? 0.0f : t, p.dot)", "fmaf(e, t, p.dot)"),
        ("-inf - -inf", "d = p_masked || q_masked ? 0.0f : t - u", "d = t - u"),
        ("no look for -inf where one tensor has none", "low = fminf(low, fminf(x[j], y[j]));", "low = fminf(low, y[j]);"),
        ("zeros of the wrong tensor", "(p_masked ? s.p_zero : s.q_zero) = 1.0f", "s.q_zero = 1.0f"),
    )
} | {
    "divergence: vectors at any address": ("elements.h", "& 15) == 0", "& 1) == 0"),
}  # fmt: skip

#: Bugs of rows of two logits tensors that blocks share.
SPLIT_MUTANTS = {
    f"split: {name}": (file, text, bug)
    for name, file, text, bug in (
        ("the last columns in every slice", "divergence.cu", "if (slice == slices.count - 1 && tail < columns) {", "if (tail < columns) {"),
        ("one slice's sums for all", "divergence.cu", "states[buffer][slice][warp] = s;", "states[buffer][0][warp] = s;"),
        ("every block sums all slices", "divergence.cu", "            end = begin + 1;\n", ""),
        ("a cluster takes a row for each of its blocks", "divergence.cu", "i = block_index() / slices.count;", "i = block_index() % call.rows;"),
        ("no cluster barrier before the first message", "divergence.cu", "                    cluster_barrier();  // the barriers of all blocks count before anything is sent\n", ""),
        ("messages not waited for", "divergence.cu", "                    if (call.split) wait_for_cluster(exchange.full, 0);\n", ""),
        ("messages of one block expected", "divergence.cu", "slices.count * int(sizeof(exchange.states[0]))", "int(sizeof(exchange.states[0]))"),
        ("messages to oneself alone", "divergence.cu", "if (call.split && lane < slices.count) send_state(s, exchange, slice, lane);", "if (call.split && lane < slices.count) send_state(s, exchange, slice, begin);"),
        ("messages to one place", "divergence.cu", "exchange.states[slice][thread_index() / 32];", "exchange.states[0][thread_index() / 32];"),
        ("the sums of a row's first warp from all", "divergence.cu", "exchange.states[slice][thread_index() / 32];", "exchange.states[slice][0];"),
        ("zeros not sent", "divergence.cu", "as_vector(s.p_zero, s.q_zero, 0.0f, 0.0f)", "as_vector(0.0f, 0.0f, 0.0f, 0.0f)"),
        ("a block writes the whole gradient", "divergence.cu", "call, slices, begin, end, g, p_cap, q_cap);", "call, slices, 0, slices.count, g, p_cap, q_cap);"),
        ("an ignored row's first slice alone", "divergence.cu", "write_ignored(call, i, out, slices, begin, end);", "write_ignored(call, i, out, slices, begin, begin + 1);"),
        ("the first slice's columns alone filled", "divergence.cu", "fill(out, part.begin_column(), part.end_column(columns), g.value);", "if (part.first) fill(out, 0, part.end_column(columns), g.value);"),
        ("a zero lost in the merge", "divergence_sums.h", "fmaxf(a.p_zero, b.p_zero)", "a.p_zero"),
        ("the largest columns of two slices left out", "divergence_sums.h", "(both ? 1.0f : 0.0f)", "0.0f"),
        ("the first slice's columns summed again", "divergence.cu", "group = slices.begin(slice) + owner", "group = slices.begin(0) + owner"),
        ("slices that are not there", "divergence_sums.h", "slice < slices ? states[slice][warp] : State()", "states[slice][warp]"),
        ("a slice ends a group early", "divergence.h", "return begin(slice + 1);", "return begin(slice + 1) - (slice + 1 < count);"),
        ("slices that overlap", "divergence.h", "return begin(slice + 1);", "return begin(slice + 1) + (slice + 1 < count);"),
        ("old GPUs asked for clusters", "dispatch.cpp", "if (device.major < 9) return", "if (false) return"),
        ("many rows split", "dispatch.cpp", "4 * call.rows >= 3 * at_once", "false"),
        ("no cluster taken for some", "dispatch.cpp", "if (!p.status && clusters == 0) return", "if (false) return"),
    )
}  # fmt: skip

#: Bugs of the kernel that scales.
SCALE_MUTANTS = {
    f"scale: {name}": ("scale.cu", text, bug)
    for name, text, bug in (
        ("written at 1", "    if (factor == 1.0f) return;\n", ""),
        ("the last column forgotten", "} else if (tail + i - head < columns) {", "} else if (tail + i - head + 1 < columns) {"),
        ("the first columns forgotten", "    if (i < head) {\n", "    if (i + 1 < head) {\n"),
        ("ends by every tile", "if (of_row == 0) scale_ends", "scale_ends"),
        ("a vector too many", "if (i >= vectors) continue;", "if (i > vectors) continue;"),
        ("a vector not loaded", "if (i < vectors) v[u]", "if (i + 1 < vectors) v[u]"),
        ("vectors at any address", "const int64_t before = int64_t(", "const int64_t before = 0 * int64_t("),
        ("the last tile forgotten", "(columns / kPerVector<T> + kScaleTile - 1) / kScaleTile", "(columns / kPerVector<T> + kScaleTile) / kScaleTile - 1"),
        ("the first row alone", "tile < call.rows * tiles", "tile < tiles"),
        ("rows in 32 bits", ": call.strides.offset(row)", ": int32_t(call.strides.offset(row))"),
        ("a factor rounded first", "values[j] *= factor;", "values[j] *= as_float(as_bits(factor) & 0xffff0000u);"),
    )
}  # fmt: skip

#: Bugs of the lanes that evaluate a loss program.
PROGRAM_MUTANTS = {
    f"program: {name}": ("program.h", text, bug)
    for name, text, bug in (
        ("no barrier between levels", "        warp_barrier();\n        begin = end;", "        begin = end;"),
        ("no barrier before the first level", "    warp_barrier();\n    run_levels(table, table.uniform_levels", "    run_levels(table, table.uniform_levels"),
        ("no barrier before the uniform levels", "    warp_barrier();\n    run_levels(table, 0", "    run_levels(table, 0"),
        ("a level of more than 32 operations cut short", "k < end; k += 32", "k < end && k < begin + 32; k += 32"),
        ("the first 32 again", "k < begin + 32 ? first : table.code[k]", "first"),
        ("the next level not fetched", "if (end + lane < following) next = table.code[end + lane];", ""),
        ("one step of row weights", "k += 27", "k += 1000"),
        ("the first term's row weight for all", "k * call.row_weights_step + i", "i"),
        ("no old log-prob on policy", "        if (!call.old_logp) inputs[kOldLogp] = s.logp;\n", ""),
        ("constants as parameters", "registers[table.parameters + i] = float", "registers[i] = float"),
        ("uniform levels skipped", "run_levels(table, 0, table.uniform_levels, 0, registers);", ""),
        ("a costly operation kept as a cheap one", "operation <= Operation::where", "operation <= Operation::div"),
    )
}  # fmt: skip

#: Bugs that show in fp32. All others are built and run only in bf16.
#: Bugs of the search of the likeliest ids.
IDS_MUTANTS = {
    f"ids: {name}": (file, text, bug)
    for name, file, text, bug in (
        ("no barrier after a step of a sort", "top_ids.h", "                }\n                warp_barrier();\n", "                }\n"),
        ("no barrier before a sort", "top_ids.h", "        warp_barrier();\n#pragma unroll 1\n        for (int run", "#pragma unroll 1\n        for (int run"),
        ("no barrier after the places", "streaming.cu", "        barrier();  // no thread reads the sums and the keys any more\n", ""),
        ("a NaN not looked for", "top_ids.h", " || sums.sum != sums.sum)", ")"),
        ("a NaN below the bound", "top_ids.h", "uint32_t(!(x[j] < least_))", "uint32_t(x[j] >= least_)"),
        ("masked logits no candidates", "top_ids.h", " || bound_ == 0", ""),
        ("columns not inverted", "top_ids.h", "uint32_t(~uint32_t(column))", "uint32_t(column)"),
        ("-0 below 0", "top_ids.h", "as_bits(logit + 0.0f)", "as_bits(logit)"),
        ("vectors after the slice", "top_ids.h", "at < vectors ? kPerVector<T> : 0", "kPerVector<T>"),
        ("threads without a column", "top_ids.h", "see<T>(v, tail, tail >= 0)", "see<T>(v, tail, 1)"),
        ("columns of the slice", "top_ids.h", "begin + at * kPerVector<T>", "at * kPerVector<T>"),
        ("the last columns forgotten", "streaming.cu", "    ids.see_tail(x, columns);\n", ""),
        ("a room that overflows", "top_ids.h", "size_ + count_bits(lanes) > room_", "size_ > room_"),
        ("two keys in one place", "top_ids.h", "(1u << (thread_index() % 32)) - 1", "(2u << (thread_index() % 32)) - 1"),
        ("old keys behind the new", "top_ids.h", "keys_[i] = 0;", "(void)i;"),
        ("a row's end unsorted", "streaming.cu", "    ids.sort();\n", ""),
        ("one warp's keys forgotten", "top_ids.h", "other < kWarps && place", "other < kWarps - 1 && place"),
        ("ids of the shard", "top_ids.h", "first_id + int32_t", "int32_t"),
        ("ids in ignored rows", "streaming.cu", "out[k] = kIgnoreIndex;", "out[k] = 0;"),
        ("a bound too high", "top_ids.h", "bound_ = keys_[count_ - 1];", "bound_ = keys_[count_ / 2];"),
    )
}  # fmt: skip
IN_FP32 = {
    "ids: vectors after the slice",
    "target by its rounded probability",
    "target capped in fp32",
    "far: the top's exponent taken for 0",
    "far: sums by the rounded reference",
    "far: exponents relative to a product",
    "far: a gradient relative to a product",
    "far: lse in fp64",
    "a log-sum-exp without its low part",
    "the scale's rounding ignored",
    "divergence: a log-sum-exp without its low part",
    "divergence: the center's rounding ignored",
    *PROGRAM_MUTANTS,
}

#: The tests that must find each bug.
ALL_MUTANTS = {
    **MUTANTS,
    **RING_MUTANTS,
    **DIVERGENCE_MUTANTS,
    **SPLIT_MUTANTS,
    **SURE_MUTANTS,
    **SCALE_MUTANTS,
    **PROGRAM_MUTANTS,
    **IDS_MUTANTS,
}
FOUND_BY = {
    **dict.fromkeys(MUTANTS, STREAMING),
    **dict.fromkeys(RING_MUTANTS, RING),
    **dict.fromkeys(DIVERGENCE_MUTANTS, DIVERGENCE),
    **dict.fromkeys(SPLIT_MUTANTS, SPLIT),
    **dict.fromkeys(SURE_MUTANTS, SURE),
    **dict.fromkeys(SCALE_MUTANTS, SCALE),
    **dict.fromkeys(PROGRAM_MUTANTS, PROGRAM),
    **dict.fromkeys(IDS_MUTANTS, IDS),
}

# Bugs that are not observable here, and why each is right or harmless:
# * wait_group() for reads only. The end of a kernel completes its writes; a block must
# only outlive the reading of its shared memory.
# * No barrier of the cluster at the end (there is none). A block has waited for
# everything that is sent to it, so no block writes to one that has ended.
# * Expecting the sums of slices after they have been sent. The phase cannot end before
# the arrival that announces them.
# * Gradients of a row before the statistics of the next one. This is slower, with the
# same results.
# * Every block putting a row's outputs instead of the first: the same values.
# * Two tensors, a block that takes all rows from its first on: each is written again,
# with the same bits.
# * Two tensors, the number of blocks: it affects only speed.
# * Two tensors, the last vector of a row at any address cut out of blocks: it reads up
# to 15 bytes behind the row, where a sanitizer looks.
# * Two tensors, split rows, another slice for each block: all are summed, and written.
# * Two tensors, an empty sum rebased from its maximum of -inf: the bound of the shift
# makes the factor 0, and its sums are.
# * Two tensors, split rows, messages announced after some have come: the phase cannot
# end before the arrival that announces them.
# * Two tensors, a NaN among the first's logits if the table is of other logits: a bound
# of the exponent makes it -200. The statistics of such a row are NaN.
# * A thread that has seen only masked logits sums them again: they have no mass,
# however they are summed.
# * publish_barriers(), acquire.cluster in wait_for_cluster(), L2 hints, the text of the
# assembly: the emulator does not execute them. The test of
#   the SASS in test_cuda_compiled.py sees the instructions; only a GPU and its
#   racecheck can show that they suffice.


def run_tests(module: Path, *files: str, **environment: str) -> subprocess.CompletedProcess:
    paths = [str(ROOT / "tests/backends/cuda" / file) for file in files]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *paths,
        ],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, "REWEIGHT_OPS_EMULATED": str(module), **environment},
    )


#: Importing PyTorch takes longer than most bugs need to show: children are forked from
#: a process that has imported it.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "reweight_ops.kernels",
        "reweight_ops._core.backends.reference",
        "reweight_ops.testing",
    ]
)


def run_forked(module: Path, file: str, log: Path) -> None:
    os.environ["REWEIGHT_OPS_EMULATED"] = str(module)
    with log.open("w") as to:
        os.dup2(to.fileno(), 1)
        os.dup2(to.fileno(), 2)
    os.chdir(ROOT)
    sys.exit(
        int(
            pytest.main(
                [
                    "-x",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                    str(ROOT / "tests/backends/cuda" / file),
                ]
            )
        )
    )


def test_without_a_bug_everything_passes():
    """Otherwise a failure would count as a found bug every time."""
    result = run_tests(build(), STREAMING, RING, DIVERGENCE, SPLIT, SURE, SCALE, PROGRAM, IDS)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_planted_bug_is_found(name, tmp_path):
    file, text, bug = ALL_MUTANTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, (
        f"the text of mutant {name!r} is there {source.count(text)} times"
    )
    path.write_text(source.replace(text, bug))
    dtypes = ("f32",) if name in IN_FP32 else ("bf16",)
    (tmp_path / "build").mkdir()
    # objects that the bug does not change are reused
    for made in build(dtypes=dtypes).parents[1].glob("*.o"):
        (tmp_path / "build" / made.name).symlink_to(made)
    module = build(tmp_path / "csrc", folder=tmp_path / "build", dtypes=dtypes)
    log = tmp_path / "log"
    process = FORK.Process(target=run_forked, args=(module, FOUND_BY[name], log))
    process.start()
    process.join(900)
    assert process.exitcode is not None, "it hangs"
    assert process.exitcode not in (0, 2, 3, 4, 5), f"not found: {name}\n{log.read_text()[-2000:]}"


@pytest.mark.parametrize("file", [STREAMING, RING, DIVERGENCE, SPLIT, SURE, SCALE, PROGRAM, IDS])
def test_sanitizers(file):
    """Reads and writes outside of rows and of shared memory, and undefined behavior,
    under AddressSanitizer and UBSan.
    """
    # also libstdc++: the sanitizer must know how exceptions are thrown before the first
    # one is thrown.
    libraries = [
        subprocess.run(
            [*(compiler() or "").split(), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("no AddressSanitizer")
    module = build(flags=("-O1", *SANITIZE))
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    result = run_tests(module, file, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS=options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
