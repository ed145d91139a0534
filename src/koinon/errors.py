"""The error tree. Every error carries the sentence a person reads and what to do next.

    KoinonError
    ├── UserError               the caller can mend it: a spec, a path, an option
    │   ├── SpecError           a key is unknown, missing, out of range or contradicts another
    │   │   ├── UnknownKey
    │   │   ├── Contradiction
    │   │   ├── StagesDoNotDivide
    │   │   └── LinkTooNarrow   k * bits cannot fit the declared link
    │   ├── DataError
    │   │   ├── EmptyCorpus
    │   │   ├── CorpusChanged
    │   │   ├── ShardDamaged
    │   │   └── TokenOutOfRange
    │   ├── NotARun             a directory holds no run
    │   ├── RunExists           a directory holds a run already
    │   ├── LogInUse            another process writes this run log
    │   ├── KeyUnsafe           a node key's file can be read by others, or holds no key
    │   ├── PortInUse
    │   ├── InvitationError     an invitation that leads nowhere
    │   │   ├── InvitationMalformed   it was mistyped, cut short, or is none
    │   │   ├── InvitationExpired
    │   │   └── InvitationUnsigned    it was not made by the coordinator that it names
    │   ├── MachineUnfit        a check before joining failed: of this machine, its link, or the way there
    │   ├── OtherRun            a joiner's directory belongs to another run
    │   └── SeatInUse           another process works in a joiner's directory
    ├── PeerError               another node did or did not do something
    │   ├── PeerUnreachable
    │   ├── NobodyAnswers
    │   ├── DeadlinePassed
    │   ├── ProtocolMismatch
    │   ├── Refused             the peer said no, and why
    │   ├── ChunkUnavailable    no source gave the right bytes of a chunk
    │   ├── RecordRefused       a record of the run log that may not follow what is held
    │   │   ├── LogGap
    │   │   ├── TermPassed
    │   │   ├── ChainBroken
    │   │   ├── SignatureInvalid
    │   │   └── TwoHeads        the coordinator signed two records for one place
    │   └── FrameError          bytes that are not a valid frame
    │       ├── FrameTooLarge
    │       └── FrameMalformed
    ├── StateError              what is on disk or in the log is not what it should be
    │   ├── LogCorrupt
    │   ├── SnapshotCorrupt
    │   ├── NothingToResume
    │   ├── TermStoreCorrupt
    │   ├── TermRefused     somebody else holds the term, or the key may not
    │   ├── Fenced          this coordinator's term is over
    │   └── DiskFull
    ├── NumericsError           NonFiniteLoss
    └── TransportUnusable       the network library on this machine cannot be used as it is

The CLI, the page and the log print `str(error)`; nothing else about an error is for people.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""What the system answers when a disk, a file or a quota is full."""


class KoinonError(Exception):
    """Base of all errors that Koinon raises on purpose."""


class UserError(KoinonError):
    """Something the caller wrote can be mended by the caller."""


class SpecError(UserError):
    """The run spec is not usable."""


class UnknownKey(SpecError):
    """A key of the spec is not known. `nearest` is the known key that looks most like it."""

    def __init__(self, key: str, nearest: str | None) -> None:
        self.key, self.nearest = key, nearest
        hint = f"did you mean `{nearest}`?" if nearest else "`koinon run --help` lists the tables and keys."
        super().__init__(f"The spec has an unknown key `{key}`: {hint}")


class Contradiction(SpecError):
    """Two keys of the spec cannot both hold."""


class StagesDoNotDivide(SpecError):
    """The layers cannot be cut into that many stages."""

    def __init__(self, layers: int, stages: int) -> None:
        self.layers, self.stages = layers, stages
        super().__init__(
            f"{layers} layers cannot be cut into {stages} stages: each stage needs at least one layer. "
            f"Set `stages` to at most {layers}, or give the model more layers."
        )


class LinkTooNarrow(SpecError):
    """The declared links cannot carry the coefficients at the declared speed."""


class DataError(UserError):
    """The corpus cannot be used."""


class EmptyCorpus(DataError):
    """There is no text where text was promised."""


class CorpusChanged(DataError):
    """The corpus on this machine is not the one that the run was started with."""


class ShardDamaged(DataError):
    """A file of token ids is not what was written."""


class TokenOutOfRange(DataError):
    """A token id is not below the vocabulary size."""


class NotARun(UserError):
    """The directory holds no run."""


class RunExists(UserError):
    """The directory already holds a run."""


class LogInUse(UserError):
    """Another process writes this run log."""

    def __init__(self, path: str, pid: int | None) -> None:
        self.path, self.pid = path, pid
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{path} is being written by {who}: a run has one writer. Stop that one first (kill {pid or 'it'})."
        )


class PortInUse(UserError):
    """The port asked for is taken."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__(f"{address} is in use by another program. Choose another port, or 0 for any free one.")


class KeyUnsafe(UserError):
    """The file of a node key can be read by others, or holds no key."""


class InvitationError(UserError):
    """An invitation that leads nowhere."""


class InvitationMalformed(InvitationError):
    """The text is no invitation: mistyped, cut short, or something else."""


class InvitationExpired(InvitationError):
    """The invitation was good until a time that is over."""


class InvitationUnsigned(InvitationError):
    """The invitation was not made by the coordinator that it names."""


class MachineUnfit(UserError):
    """A check before joining failed. `hop`: which; the sentence says what was found and what to do."""

    def __init__(self, hop: str, found: str, remedy: str) -> None:
        self.hop, self.found, self.remedy = hop, found, remedy
        super().__init__(f"{hop}: {found} {remedy}".rstrip())


class OtherRun(UserError):
    """A joiner's directory belongs to another run than the one it is asked to join."""


class SeatInUse(UserError):
    """Another process works in this directory of a joiner."""

    def __init__(self, directory: str, pid: int | None) -> None:
        self.directory, self.pid = directory, pid
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{directory} is the seat of {who}, which is at work: one directory, one worker. "
            f"End it with `koinon leave {directory}`, or join with another --dir."
        )


class PeerError(KoinonError):
    """Another node did something, or did not."""


class PeerUnreachable(PeerError):
    """No path to `peer` worked. `tried`: each address and what it answered."""

    def __init__(self, peer: str, tried: dict[str, str]) -> None:
        self.peer, self.tried = peer, tried
        hops = "; ".join(f"{address}: {answer}" for address, answer in tried.items()) or "no address is known"
        super().__init__(f"Cannot reach {peer[:10]} ({hops}). Check that it runs and that UDP to that address is open.")


class NobodyAnswers(PeerError):
    """Not one of the seats answers."""

    def __init__(self, asked: int) -> None:
        self.asked = asked
        super().__init__(
            f"None of {asked} seats answers this node. It lets the term go, for a standby that reaches them. Check its "
            f"network; it tries again."
        )


class DeadlinePassed(PeerError):
    """A peer did not answer before its deadline."""


class ProtocolMismatch(PeerError):
    """The peer speaks another protocol version."""


class Refused(PeerError):
    """The peer said no; `reason` is its sentence."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RecordRefused(PeerError):
    """A record of the run log may not follow what is held."""


class LogGap(RecordRefused):
    """A record came before the ones between it and what is held: fetch from `expected` on."""

    def __init__(self, expected: int, got: int) -> None:
        self.expected, self.got = expected, got
        super().__init__(f"Run log record {got} came before record {expected}: fetch the records from {expected} on.")


class TermPassed(RecordRefused):
    """A record of a coordinator whose term is over."""

    def __init__(self, current: int, got: int) -> None:
        self.current, self.got = current, got
        super().__init__(f"A run log record of term {got} came in term {current}: its coordinator has been replaced.")


class ChainBroken(RecordRefused):
    """A record does not continue the history that is held at `seq`."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        super().__init__(
            f"Run log record {seq} does not continue the history held here. "
            f"Compare the log's head with other nodes and go back to the last record in common."
        )


class SignatureInvalid(RecordRefused):
    """A record is not signed by the coordinator of its term."""

    def __init__(self, seq: int, term: int) -> None:
        self.seq, self.term = seq, term
        super().__init__(f"Run log record {seq} is not signed by the coordinator of term {term}.")


class TwoHeads(RecordRefused):
    """The coordinator signed two records for one place. `evidence` holds both and convinces anyone."""

    def __init__(self, seq: int, term: int, evidence: object) -> None:
        self.seq, self.term, self.evidence = seq, term, evidence
        super().__init__(
            f"The coordinator of term {term} signed two different records number {seq}. "
            f"Keep both: they are evidence against it. Trust no record of this term from {seq} on."
        )


class ChunkUnavailable(PeerError):
    """No source gave the right bytes. `answers`: what each source said or did."""

    def __init__(self, digest: str, answers: dict[str, str]) -> None:
        self.digest, self.answers = digest, answers
        said = "; ".join(f"{source[:10]}: {answer}" for source, answer in answers.items()) or "there is no source"
        super().__init__(f"No source gave chunk {digest[:10]} ({said}). It is asked for again when a source appears.")


class FrameError(PeerError):
    """Bytes from a peer are not a frame we accept."""


class FrameTooLarge(FrameError):
    """A frame promises more than is allowed."""


class FrameMalformed(FrameError):
    """A frame's header or body breaks the format."""


class StateError(KoinonError):
    """What is on disk is not what it should be."""


class LogCorrupt(StateError):
    """A record in the middle of the run log is damaged: nothing after it can be trusted."""


class SnapshotCorrupt(StateError):
    """A snapshot's bytes do not hash to the root that the log committed."""


class NothingToResume(StateError):
    """No common step can be restored from what is on disk."""


class TermStoreCorrupt(StateError):
    """What lies in the term store is no list of terms."""


class TermRefused(StateError):
    """A term was not given."""


class Fenced(StateError):
    """This coordinator's term is over: another holds the next. Nothing that it writes counts any more."""

    def __init__(self, mine: int, current: int, holder: str) -> None:
        self.mine, self.current, self.holder = mine, current, holder
        who = f"{holder[:10]} holds term {current}" if current > mine else f"term {mine} was revoked or never given"
        super().__init__(
            f"This coordinator's term {mine} is over: {who}. It has stopped writing; the run goes on without it. "
            f"`koinon standby DIR --dir DIR` with its directory follows the run; what nobody else saw is set aside."
        )


class DiskFull(StateError):
    """A write failed for lack of room; what was committed before is intact."""


@contextmanager
def room(path: object) -> Iterator[None]:
    """Turn "no space" from the system into DiskFull, which says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(
                f"No room to write {path}: free some space and start again; what is whole is kept."
            ) from error
        raise


class NumericsError(KoinonError):
    """The arithmetic left the numbers."""


class NonFiniteLoss(NumericsError):
    """The loss or a gradient is NaN or infinite. `what` is one sentence; what to do follows it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} Start a new run with a lower `muon_lr` and `adamw_lr`. The last committed step is intact, but to "
            "resume from it helps only if a machine has erred: a run's spec cannot change."
        )


class TransportUnusable(KoinonError):
    """The network library on this machine cannot be used as it is."""
