"""Continuous batching: add requests, call step() until idle, read the outputs.

A request's tokens depend only on the model, the prompt and the sampling. Neighbours in the batch, the prefix
cache, and a removal followed by a new `add` change nothing. One thread; knows no files, users or clock.

Large: one step touches sequences, blocks and outputs together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens

import numpy as np
from numpy.typing import NDArray

from aiosd.cores.engine import sampler
from aiosd.cores.engine.conversations import Conversations, KvCopy
from aiosd.cores.engine.core import KV, Batch, Segment
from aiosd.cores.engine.kv import BLOCK, BlockPool, root
from aiosd.cores.engine.model import LoadedModel
from aiosd.cores.engine.penalties import Penalties
from aiosd.cores.engine.sampler import Row, TokenLogprob
from aiosd.cores.engine.sequence import Output, Sequence
from aiosd.cores.engine.text import TextStream
from aiosd.errors import BadRequest, ModelError, TooLong
from aiosd.syscall.sampling import BIAS_HINT, Sampling

Plan = list[tuple[Sequence, int]]  # the sequences of a step, and how many pending tokens of each it computes


class Engine:
    def __init__(
        self, model: LoadedModel, *, kv_bytes: int, max_running: int = 64, prefill_tokens: int = 512
    ) -> None:
        self.model = model
        self.core = model.core
        blocks = kv_bytes // (BLOCK * model.kv_bytes_per_token)
        if blocks == 0:
            raise TooLong(
                f"{kv_bytes} bytes of KV memory hold no block of {BLOCK} tokens",
                f"give at least {BLOCK * model.kv_bytes_per_token} bytes",
            )
        try:
            self._kv = self.core.reserve(blocks)
        except (RuntimeError, OSError, OverflowError) as error:  # each kind of memory has its own error
            why = str(error).splitlines()[0]
            raise ModelError(
                f"no room for {kv_bytes} bytes of KV: {why}", "lower kv_bytes in [engine] of aiosd.toml"
            ) from None
        self.pool = BlockPool(blocks)
        self.conversations = Conversations(self.core, self._kv, self.pool)
        self.max_running = max_running
        self.prefill_tokens = max(prefill_tokens, self.core.chunk)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._parked: dict[int, Sequence] = {}  # preempted; they keep their KV until others need the blocks
        self._ended: list[Output] = []  # outputs for the next step to return
        self._steps = self._generated = self._hits = 0

    def add(
        self,
        id: int,
        prompt: list[int],
        sampling: Sampling,
        *,
        owner: str,
        resume: Tokens[int] = (),
        context: int = 0,
        embed: bool = False,
        grammar: str = "",
    ) -> None:
        """Queue a request.

        `resume`: tokens of the answer generated earlier; they are not emitted again. `context`: the request's
        conversation, which keeps the KV when the request ends; 0: none. `embed`: compute the direction of the
        prompt's mean final hidden state (Output.embedding) instead of an answer. `grammar`: the grammar of
        the answer (aiosd.syscall.grammar); empty: none. Raises TooLong, and BadRequest for tokens outside the
        vocabulary, for an unusable grammar, and for a `resume` that does not fit the grammar.
        """
        self._check_length(len(prompt))
        if not prompt or not all(0 <= t < self.model.vocab_size for t in (*prompt, *resume)):
            raise BadRequest(f"the prompt is empty or has tokens outside of 0 to {self.model.vocab_size - 1}")
        self._check_biases(sampling)
        assert all(s.id != id for s in self._everyone())
        parked = self._parked.pop(id, None)
        if parked and parked.tokens == [*prompt, *resume] and parked.same_as(sampling, root(owner), grammar):
            parked.context = context
            self._waiting.append(parked)
            return
        if parked:
            self._strip(parked)
        stream = TextStream(self.model.vocabulary, sampling.stop, sampling.min_tokens)
        seq = Sequence(
            id,
            list(prompt),
            len(prompt),
            sampling,
            self.model.context_length,
            self.model.eos,
            stream,
            root(owner),
            context=context,
            constraint=self.model.constraints.make(grammar) if grammar else None,
            penalties=Penalties(sampling, prompt) if sampling.penalises else None,
            pooled=np.zeros(1) if embed else None,
        )
        for token in resume:
            if not seq.finish:
                seq.accept(token)
        if seq.finish:  # the request had ended, but its end was lost
            self._ended.append(
                Output(id, finish=seq.finish, prompt_tokens=seq.prompt, stopped=stream.stopped)
            )
        elif sampling.max_tokens <= 0:
            self._ended.append(Output(id, finish="length", prompt_tokens=seq.prompt))
        elif seq.blocks_for(len(seq.tokens)) > self.pool.total:
            self._ended.append(Output(id, text=stream.flush(), finish="length", prompt_tokens=seq.prompt))
        else:
            self._waiting.append(seq)

    def remove(self, id: int, keep: bool = True) -> None:
        """Preempt a request between two steps, or cancel it (`keep` false). Ignore one that has ended."""
        for seq in self._everyone():
            if seq.id == id and keep and seq in self._running:
                self._running.remove(seq)
                self._keep(seq)
                self._parked[id] = seq
            elif seq.id == id:
                seq.context = seq.context if keep else 0
                self._leave(seq)
        self._ended = [o for o in self._ended if o.id != id]

    def step(self) -> list[Output]:
        """Run one forward pass over everything that can run, and return its outputs."""
        self._admit()
        plan = self._decodes()
        plan += self._prefills(self.prefill_tokens - len(plan))
        ended, self._ended = self._ended, []
        if not plan:
            return ended
        rows, states = self.core.forward(self._batch(plan), self._kv)
        return ended + self._advance(plan, rows.numpy(), states.numpy())

    def snapshot(self, context: int) -> KvCopy | None:
        """The KV computed so far of a conversation, also during its turn. None: there is none."""
        for seq in self._running:
            if seq.context == context:
                self._keep(seq)
        return self.conversations.snapshot(context)

    def restore(self, context: int, owner: str, tokens: list[int], prompt: int, kv: KV) -> int:
        """Take back the KV of a snapshot. Return the number of tokens whose KV found room. Raises
        BadSnapshot, BadRequest."""
        if not all(0 <= t < self.model.vocab_size for t in tokens):
            raise BadRequest(f"the file has tokens outside of 0 to {self.model.vocab_size - 1}")
        blocks = kv[0].shape[self.core.kv_block_dim] if kv and kv[0].dim() > self.core.kv_block_dim else 0
        self._make_room(blocks, self._busy)
        return self.conversations.restore(context, owner, tokens, prompt, kv)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._ended)

    @property
    def stats(self) -> dict[str, int]:
        block_bytes = BLOCK * self.model.kv_bytes_per_token
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "steps": self._steps,
            "generated_tokens": self._generated,
            "prefix_hit_tokens": self._hits,
            "kv_blocks_used": self.pool.held,
            "kv_blocks_total": self.pool.total,
            "kv_bytes_used": self.pool.held * block_bytes,
            "kv_bytes_total": self.pool.total * block_bytes,
        }

    # --- who runs ---

    def _admit(self) -> None:
        """Admit in order of arrival. But a sequence whose next block a running prefill is computing waits for
        that block."""
        coming = {k for s in self._running if s.pending > 1 for k in s.keys[s.published :]}
        for seq in list(self._waiting):
            if len(self._running) >= self.max_running:
                return
            keys = seq.full_keys(self.core.chunk)
            if coming and self.pool.first_missing(keys) in coming:
                continue
            if not self._place(seq):
                return
            self._waiting.remove(seq)
            self._running.append(seq)
            coming.update(keys[seq.published :])

    def _place(self, seq: Sequence) -> bool:
        """Take cached and new blocks for all known tokens. Return False, and take none, if too few are
        free."""
        if seq.blocks:
            return self._continue(seq)
        keys = seq.full_keys(self.core.chunk)[: (len(seq.tokens) - 1) // BLOCK]
        found = self.pool.find(keys) if seq.pooled is None else []  # embedding needs the state of every token
        usable = self._reusable(seq, len(found) * BLOCK) // BLOCK
        self.pool.release(found[usable:])
        need = seq.blocks_for(len(seq.tokens)) - usable
        room = need + len(self._running)
        for busy in (self._busy | {seq.context}, self._busy):  # its own KV goes last
            self._make_room(room, busy, seq)
        # Leave one block for each running sequence, so that the new one does not push out another at once.
        if self.pool.available < need + len(self._running):
            self.pool.release(found[:usable])
            return False
        seq.blocks.extend(found[:usable])
        seq.published = usable
        seq.cached = seq.computed = usable * BLOCK
        self._hits += seq.cached
        for _ in range(need):
            self._extend(seq)
        return True

    def _continue(self, seq: Sequence) -> bool:
        """Place a parked sequence, which still has its blocks."""
        need = seq.blocks_for(len(seq.tokens)) - len(seq.blocks)
        self._make_room(need + len(self._running), self._busy | {seq.context}, seq)
        if self.pool.available < need + len(self._running):
            self._strip(seq)
            return self._place(seq)
        for _ in range(need):
            self._extend(seq)
        return True

    def _make_room(self, blocks: int, busy: set[int], but: Sequence | None = None) -> None:
        """Take the KV of preempted sequences, the oldest first, then of conversations."""
        holding = [*self._parked.values(), *(s for s in reversed(self._waiting) if s is not but and s.blocks)]
        for seq in holding:
            if self.pool.available >= blocks:
                return
            self._parked.pop(seq.id, None)
            self._strip(seq)
        self.conversations.make_room(blocks, busy)

    def _strip(self, seq: Sequence) -> None:
        """Release the sequence's blocks. Published blocks stay findable until they are reused."""
        self.pool.release(seq.blocks)
        seq.blocks = seq.blocks[:0]
        seq.computed = seq.published = 0
        if seq.pooled is not None:
            seq.pooled = np.zeros(1)

    def _reusable(self, seq: Sequence, found: int) -> int:
        """How many of the found tokens may be reused: with a chunk, prefill must begin at a multiple of
        it."""
        chunk = self.core.chunk
        return found if chunk == 1 or found >= seq.prompt else found // chunk * chunk

    def _decodes(self) -> Plan:
        plan: Plan = []
        for seq in list(self._running):
            if seq.decoding and self._grow(seq):
                plan.append((seq, 1))
        return plan

    def _prefills(self, budget: int) -> Plan:
        plan: Plan = []
        chunk = self.core.chunk
        budget = max(budget, chunk, BLOCK)
        for seq in self._running:
            if seq.decoding:
                continue
            n = min(seq.pending, budget)
            if seq.computed + n < seq.prompt:  # stop at a multiple of the chunk
                n = (seq.computed + n) // chunk * chunk - seq.computed
            if n > 0:
                plan.append((seq, n))
                budget -= n
            if budget <= 0:
                break
        return plan

    # --- KV ---

    def _extend(self, seq: Sequence) -> bool:
        block = self.pool.allocate()
        if block is not None:
            seq.blocks.append(block)
        return block is not None

    def _grow(self, seq: Sequence) -> bool:
        """Make room for one more token. If nothing else helps, push out the youngest running sequence. Return
        False when that was `seq`."""
        while len(seq.blocks) * BLOCK <= seq.computed:
            if seq not in self._running:
                return False
            self._make_room(1, self._busy)
            if not self._extend(seq):
                self._push_out(self._running[-1])
        return seq in self._running

    def _push_out(self, seq: Sequence) -> None:
        alone = len(self._running) == 1
        text = seq.stream.flush() if alone else ""
        self._leave(seq)
        self._ended.append(
            Output(
                seq.id,
                text=text,
                finish="length" if alone else "preempted",
                prompt_tokens=seq.prompt,
                cached_tokens=seq.cached,
            )
        )

    @property
    def _busy(self) -> set[int]:
        """The conversations with a running turn. KV of waiting turns may go: the engine can compute it
        again."""
        return {seq.context for seq in self._running}

    def _keep(self, seq: Sequence) -> None:
        """Keep the KV for the conversation. Skip a turn that ended during prefill: it has less KV than the
        conversation had before."""
        if seq.context and (seq.finish or seq.computed >= seq.prompt):
            self.conversations.keep(seq.context, seq.tokens, seq.prompt, seq.keys[: seq.published])

    def _leave(self, seq: Sequence) -> None:
        if seq in self._running:
            self._running.remove(seq)
            self._keep(seq)
            self.pool.release(seq.blocks)
            seq.blocks = seq.blocks[:0]
        else:
            self._waiting.remove(seq)
            self._strip(seq)

    # --- one step ---

    def _batch(self, plan: Plan) -> Batch:
        batch = Batch([], [], [])
        for seq, n in plan:
            batch.segments.append(Segment(seq.blocks, seq.computed, n, seq.prompt))
            batch.tokens += seq.tokens[seq.computed : seq.computed + n]
            if seq.pooled is not None:
                batch.states += range(len(batch.tokens) - n, len(batch.tokens))
            elif n == seq.pending:
                batch.rows.append(len(batch.tokens) - 1)
        return batch

    def _advance(self, plan: Plan, rows: Row, states: Row) -> list[Output]:
        """Record the computed KV. Draw the next token of each sequence whose tokens all have KV."""
        outputs = []
        greedy = np.argmax(rows, axis=1).tolist() if len(rows) else []
        row = 0
        for seq, n in plan:
            seq.computed += n
            self._publish(seq)
            if seq.pooled is not None:
                for state in states[:n]:  # add in order: the cuts of prefill must not change the sum
                    seq.pooled = seq.pooled + state
                states = states[n:]
                if seq.pending == 0:
                    outputs.append(self._embedded(seq, seq.pooled))
            elif seq.pending == 0:
                outputs.append(self._drawn(seq, rows[row], greedy[row]))
                row += 1
        self._steps += 1
        self._generated += len(outputs)
        return outputs

    def _drawn(self, seq: Sequence, logits: Row, likeliest: int) -> Output:
        try:
            return self._draw(seq, logits, likeliest)
        except BadRequest as error:  # the request's grammar became too expensive; only this request fails
            seq.finish = "failed"
            self._leave(seq)
            return Output(seq.id, finish="failed", prompt_tokens=seq.prompt, error=error)

    def _draw(self, seq: Sequence, logits: Row, likeliest: int) -> Output:
        s, allowed, own = seq.sampling, seq.allowed(), logits
        if seq.penalties is not None:
            logits = seq.penalties.applied(own)
            likeliest = int(logits.argmax())
        free = not seq.banned if allowed is None else bool(allowed[likeliest])
        if s.temperature <= 0.0 and free:
            token = likeliest
        else:
            token = sampler.choose(logits, s, seq.generated, seq.banned, allowed)
        logprobs: tuple[TokenLogprob, ...] | None = None
        if s.logprobs is not None:
            logprobs = (sampler.logprob(own, token, s.logprobs),)
        text = seq.accept(token)
        if seq.finish:
            self._leave(seq)
        stopped = seq.stream.stopped
        return Output(seq.id, (token,), text, logprobs, seq.finish, seq.prompt, stopped, seq.cached)

    def _embedded(self, seq: Sequence, pooled: NDArray[np.float64]) -> Output:
        """Return the direction of the sum of the final hidden states; the mean has the same direction."""
        seq.finish = "stop"
        self._leave(seq)
        length = float(np.linalg.norm(pooled))
        # An overflowed sum has no direction, and JSON has no inf: give zeros.
        vector = (pooled / length if 0 < length < np.inf else np.zeros_like(pooled)).astype(np.float32)
        return Output(
            seq.id, finish="stop", prompt_tokens=seq.prompt, embedding=tuple(float(str(x)) for x in vector)
        )

    def _publish(self, seq: Sequence) -> None:
        full = seq.computed // BLOCK
        if full > seq.published:
            keys = seq.full_keys(self.core.chunk)
            for i in range(seq.published, full):
                self.pool.publish(seq.blocks[i], keys[i])
            seq.published = full

    def _everyone(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def _check_biases(self, sampling: Sampling) -> None:
        for token in sampling.logit_bias:
            if int(token) >= self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise BadRequest(f"logit_bias: the model has tokens 0 to {last}, and no {token}", BIAS_HINT)

    def _check_length(self, prompt: int) -> None:
        limit, room = self.model.context_length, self.pool.total * BLOCK
        if prompt + 1 > limit:
            raise TooLong(
                f"the prompt has {prompt} tokens and the model's context holds {limit}",
                "shorten the prompt, or use a model with a longer context",
            )
        if prompt + 1 > room:
            raise TooLong(
                f"the prompt has {prompt} tokens and the KV memory holds {room}",
                "shorten the prompt, or raise kv_bytes in [engine] of aiosd.toml",
            )
