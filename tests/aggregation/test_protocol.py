"""The protocol: exact sums under every pattern of drop-outs, and what honest parties do when somebody is not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation.secure import Identities, SecureClient, SecureServer, Session, default_threshold
from fedlight.aggregation.secure import messages as wire
from fedlight.aggregation.secure.messages import SERVER, Keys, Request, Stage
from fedlight.aggregation.secure.primitives import KeyPair, combine
from fedlight.aggregation.secure.sums import add_mask
from fedlight.core.codec import Context
from fedlight.core.digest import digest_context
from fedlight.core.errors import ConfigurationError, MessageError, ProtocolError
from fedlight.rounds.availability import STAGES
from tests.aggregation.cohort import SecureCohort
from tests.aggregation.parties import (
    Play,
    counting,
    random_codes,
    read_keys,
    read_roster,
    session_of,
    write_keys,
    write_roster,
    write_survivors,
)

# -- exact sums --------------------------------------------------------------------------------------------------------------------


def outcome(session: Session, codes: np.ndarray, weights, silent: dict[int, str], seed: int = 0) -> tuple[np.ndarray, int]:
    """Return what a session ends with in which clients fall silent."""
    cohort = SecureCohort(session, range(len(codes)), Identities(counting(-1)), silent, counting(seed))
    for client in cohort.open():
        if silent.get(client) == "train":
            with pytest.raises(MessageError, match="fell silent"):
                cohort.send(client, codes[client], weights[client])
        else:
            cohort.receive(client, cohort.send(client, codes[client], weights[client]))
    return cohort.close()


def expect(session: Session, codes: np.ndarray, weights, silent: dict[int, str]) -> None:
    """The sum is that of the clients that sent a code, bit for bit, if and only if enough stay to the end."""
    if len(codes) - len(silent) < session.threshold:
        with pytest.raises(ProtocolError, match=f"at least {session.threshold} clients"):
            outcome(session, codes, weights, silent)
        return
    result = outcome(session, codes, weights, silent)
    sent = [client for client in range(len(codes)) if silent.get(client) not in ("advertise_keys", "share_keys", "train")]
    assert result[0].dtype == np.int64
    assert (result[0] == sum(weights[client] * codes[client].astype(np.int64) for client in sent)).all()
    assert result[1] == sum(weights[client] for client in sent)


@st.composite
def sessions(draw):
    clients = draw(st.integers(3, 9))
    threshold = draw(st.integers(clients // 2 + 1, clients))
    limits = tuple(draw(st.lists(st.tuples(st.sampled_from([1, 3, 7, 127, 2047]), st.integers(1, 40)), min_size=1, max_size=3)))
    session = session_of(clients, threshold, limits, draw(st.sampled_from([1, 5])))
    fallen = draw(st.dictionaries(st.integers(0, clients - 1), st.sampled_from(STAGES), max_size=clients - threshold + 1))
    return session, fallen, draw(st.integers(0, 1000))


@given(sessions())
def test_the_sum_is_exact_whoever_falls_silent_and_when(drawn):
    session, silent, seed = drawn
    weights = np.random.default_rng(seed).integers(1, session.format.max_weight + 1, session.clients).tolist()
    expect(session, random_codes(session, seed), weights, silent)


@pytest.mark.parametrize("clients", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_the_sum_is_exact_under_every_pattern_that_leaves_enough(clients):
    threshold = clients // 2 + 1
    session = session_of(clients, threshold, ((7, 2),))
    codes = random_codes(session)
    for gone in range(clients - threshold + 1):
        for who in itertools.combinations(range(clients), gone):
            for when in itertools.product(STAGES, repeat=gone):
                expect(session, codes, [1] * clients, dict(zip(who, when, strict=True)))


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_threshold_is_enough_at_every_stage_and_one_fewer_is_not(stage):
    session = session_of(7, 5)
    for gone in (2, 3):
        expect(session, random_codes(session), [1] * 7, dict.fromkeys(range(gone), stage))


@pytest.mark.slow
def test_many_clients():
    session = session_of(40, default_threshold(40), ((7, 50),))
    expect(session, random_codes(session), [1] * 40, {i: STAGES[i % 5] for i in range(13)})


def test_one_party_at_a_time_gives_the_same_sum():
    play = Play(5, 3)
    assert (play.total(silent=(1, 4)) == play.codes[[0, 2, 3]].sum(0)).all()


# -- masks -------------------------------------------------------------------------------------------------------------------------


def masked(play: Play) -> dict[int, np.ndarray]:
    inboxes = play.inboxes()
    sent = {i: play.clients[i].masked_code(inbox, play.codes[i]) for i, inbox in inboxes.items()}
    return {i: play.session.format.unpack(wire.read_masked(play.session, message, i)) for i, message in sent.items()}


def test_every_session_has_masks_of_its_own():
    """The same codes, keys of the same long-lived owners, and nothing that a second session sends was seen in the first."""
    limits = ((7, 400),)
    first, second = Play(3, 2, limits=limits), Play(3, 2, limits=limits, seed=1)
    second.codes = first.codes
    one, two = masked(first), masked(second)
    for i in one:
        assert (one[i] == two[i]).mean() < 0.1 and (one[i] == first.session.format.words(first.codes[i], 1)).mean() < 0.1


def test_a_masked_code_looks_the_same_whatever_the_code():
    """All words of the modulus are about equally frequent, for a code of zeros as for one at the end of its range."""
    for value in (0, 7):
        play = Play(3, 2, limits=((7, 20_000),))
        play.codes = np.full((3, 20_000), value, np.int32)
        for words in masked(play).values():
            counts = np.bincount(words.astype(int), minlength=43)  # 2 * 3 * 7 + 1
            expected = 20_000 / 43
            assert len(counts) == 43 and ((counts - expected) ** 2 / expected).sum() < 100  # 42 degrees of freedom: 1 in 10**6


def test_masks_of_those_who_sent_cancel_but_for_their_own():
    """What is left when all are added is the sum under everybody's own masks: without their seeds it tells nothing."""
    play = Play(4, 3, limits=((7, 300),))
    words = sum(masked(play).values()) % play.session.format.modulus
    assert (play.session.format.integers(words) == play.codes.sum(0)).mean() < 0.1


# -- refusals before anything is sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "threshold"), [(1, 1), (2, 2), (3, 1), (4, 2), (10, 5), (10, 11)])
def test_cohorts_and_thresholds_that_hide_nothing_are_refused(clients, threshold):
    with pytest.raises(ConfigurationError, match=r"cohort of at least 3|more than half"):
        session_of(clients, threshold)


@pytest.mark.parametrize("name", ["encoder", "model", "broadcast", "training"])
def test_digests_are_whole(name):
    with pytest.raises(ConfigurationError, match=f"`{name}` of 32 bytes"):
        session_of(3, 2, **{name: b"short"})


def test_a_cohort_larger_than_declared_is_refused():
    play = Play(4, 3)
    with pytest.raises(ProtocolError, match="declared cohort of 4 clients but got 5"):
        SecureServer(play.session, range(5), play.directory)


@pytest.mark.parametrize(("code", "weight"), [(np.full(5, 8), 1), (np.zeros(5, int), 2), (np.zeros(4, int), 1), (np.zeros(5), 1)])
def test_a_code_or_weight_beyond_what_was_declared_leaves_nobody(code, weight):
    play = Play()
    inbox = play.inboxes()[0]
    with pytest.raises(ProtocolError):
        play.clients[0].masked_code(inbox, code, weight)
    answers_nothing_more(play, 0)


# -- dishonest servers -------------------------------------------------------------------------------------------------------------


def answers_nothing_more(play: Play, number: int) -> None:
    """A client that refused once refuses everything, and has forgotten its secrets."""
    client = play.clients[number]
    asks = [client.advertise, *(lambda ask=ask: ask(b"") for ask in (client.share, client.consistency, client.unmask))]
    for ask in [*asks, lambda: client.masked_code(b"", play.codes[number])]:
        with pytest.raises(ProtocolError, match="nothing more in this session"):
            ask()
    assert client._seeds == (b"", b"") and not client._shares and not client._pair_masks and not client._channels
    assert client._mask is None and client._channel is None


def refuses(play: Play, number: int, ask, said: str, kind: type[Exception] = ProtocolError) -> None:
    with pytest.raises(kind, match=said):
        ask()
    answers_nothing_more(play, number)


def entries(play: Play) -> dict[int, Keys]:
    return read_roster(play.session, play.roster())


def test_a_roster_below_the_threshold_is_refused_by_clients_too():
    play = Play()
    roster = entries(play)
    few = write_roster(play.session, {i: roster[i] for i in (0, 1)})
    refuses(play, 0, lambda: play.clients[0].share(few), "at least 3 clients that advertised keys but got 2")


def test_a_roster_larger_than_declared_is_refused():
    play = Play()
    roster = entries(play)
    many = write_roster(play.session, roster | {4: roster[0]})
    refuses(play, 0, lambda: play.clients[0].share(many), "bytes but got", MessageError)


@pytest.mark.parametrize("field", ["channel", "mask", "commitment", "signature"])
def test_a_key_that_the_server_put_in_is_refused(field):
    play = Play()
    roster = entries(play)
    own = KeyPair(bytes(range(32))).public
    roster[2] = roster[2]._replace(**{field: own + (own if field == "signature" else b"")})
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "signature of client 2")


def test_keys_under_another_number_are_refused():
    play = Play()
    roster = entries(play)
    roster[1], roster[2] = roster[2], roster[1]
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "signature of client 1")


def test_the_same_keys_twice_are_refused():
    play = Play()
    roster = entries(play)
    roster[2] = roster[1]
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "distinct keys")


def test_ones_own_keys_must_come_back_unchanged():
    play = Play()
    roster = entries(play)
    roster[0] = roster[0]._replace(commitment=bytes(32))
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "own keys")


def test_clients_that_nobody_knows_are_refused():
    """A server cannot fill a cohort with clients whose keys are not known beforehand."""
    play = Play()
    roster = entries(play)
    sybil = Identities(counting(5)).of(9)
    keys = roster[3]._replace(channel=KeyPair(bytes(32)).public, mask=KeyPair(b"\1" * 32).public)
    roster[9] = keys._replace(signature=sybil.sign(keys.signed(play.session, 9)))
    del roster[3]
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "but got client 9")


@pytest.mark.parametrize("field", ["channel", "mask"])
def test_a_key_of_low_order_is_refused_though_its_owner_signed_it(field):
    play = Play()
    roster = entries(play)
    keys = roster[2]._replace(**{field: bytes(32)})
    roster[2] = keys._replace(signature=play.identities.of(2).sign(keys.signed(play.session, 2)))
    refuses(play, 0, lambda: play.clients[0].share(write_roster(play.session, roster)), "low order")


def boxes(play: Play, number: int = 0) -> dict[int, bytes]:
    return dict(wire.read_records(play.session, play.inboxes()[number], Stage.INBOX, SERVER))


def deliver(play: Play, sealed: dict[int, bytes], number: int = 0):
    inbox = wire.write_records(play.session, Stage.INBOX, SERVER, sealed.items())
    return lambda: play.clients[number].masked_code(inbox, play.codes[number])


def test_a_tampered_ciphertext_is_refused():
    for at in (0, 20, 47):
        play = Play()
        sealed = boxes(play)
        sealed[1] = sealed[1][:at] + bytes([sealed[1][at] ^ 1]) + sealed[1][at + 1 :]
        refuses(play, 0, deliver(play, sealed), "sealed by client 1")


def test_a_swapped_sender_is_refused():
    play = Play()
    sealed = boxes(play)
    sealed[1], sealed[2] = sealed[2], sealed[1]
    refuses(play, 0, deliver(play, sealed), "sealed by client")


def test_shares_for_somebody_else_are_refused():
    play = Play()
    inboxes = play.inboxes()
    sealed = dict(wire.read_records(play.session, inboxes[0], Stage.INBOX, SERVER))
    sealed[2] = dict(wire.read_records(play.session, inboxes[1], Stage.INBOX, SERVER))[2]
    refuses(play, 0, deliver(play, sealed), "sealed by client 2")


def test_an_inbox_below_the_threshold_or_from_strangers_is_refused():
    play = Play()
    sealed = boxes(play)
    refuses(play, 0, deliver(play, {1: sealed[1]}), "at least 3 clients that shared their seeds but got 2")
    play = Play()
    sealed = boxes(play)
    sealed[9] = sealed.pop(3)
    refuses(play, 0, deliver(play, sealed), "of the roster alone")


@pytest.mark.parametrize("said_to_survive", [(0, 1), (1, 2, 3), (0, 1, 9)], ids=["too few", "without me", "a stranger"])
def test_survivors_that_cannot_be_are_not_signed(said_to_survive):
    play = Play()
    play.survivors()
    message = write_survivors(play.session, said_to_survive)
    refuses(play, 0, lambda: play.clients[0].consistency(message), "Expected")


def test_a_second_list_of_survivors_is_not_signed():
    play = Play()
    survivors = play.survivors()
    play.clients[0].consistency(survivors)
    other = write_survivors(play.session, (0, 1, 2))
    with pytest.raises(ProtocolError, match="answered once, in order"):
        play.clients[0].consistency(other)
    answers_nothing_more(play, 0)


def asked(play: Play, silent: tuple[int, ...] = ()) -> Request:
    return wire.read_request(play.session, play.request(silent))


def ask(play: Play, request: Request, number: int = 0):
    message = wire.write_request(play.session, request)
    return lambda: play.clients[number].unmask(message)


def test_nobody_is_unmasked_both_ways():
    """With both masks off a client's code would lie open."""
    play = Play(5, 3)
    request = asked(play, silent=(4,))
    refuses(play, 0, ask(play, replace(request, dropped=(1, 4))), "one is listed twice")


def test_a_survivor_is_not_called_dropped_after_it_was_signed_for():
    play = Play(5, 3)
    request = asked(play)
    refuses(play, 0, ask(play, replace(request, survivors=(0, 1, 2, 3), dropped=(4,))), "signed for")


def test_everybody_who_shared_is_a_survivor_or_dropped_and_nobody_else():
    play = Play(5, 3)
    request = asked(play, silent=(4,))
    refuses(play, 0, ask(play, replace(request, dropped=())), "as survivors or as dropped")
    play = Play(5, 3)
    request = asked(play)
    refuses(play, 0, ask(play, replace(request, dropped=(9,))), "as survivors or as dropped")


def test_a_request_with_fewer_survivors_than_the_threshold_is_refused():
    play = Play(5, 3)
    request = asked(play)
    refuses(play, 0, ask(play, replace(request, survivors=(0, 1), dropped=(2, 3, 4))), "at least 3 clients that are said to be survivors")


def test_fewer_signatures_than_the_threshold_or_forged_ones_are_refused():
    play = Play()
    request = asked(play)
    refuses(play, 0, ask(play, replace(request, signatures={i: request.signatures[i] for i in (0, 1)})), "signed the survivors but got 2")
    play = Play()
    request = asked(play)
    refuses(play, 0, ask(play, replace(request, signatures=request.signatures | {1: bytes(64)})), "signature of client 1")
    play = Play(5, 3)
    request = asked(play, silent=(4,))
    refuses(play, 0, ask(play, replace(request, signatures=request.signatures | {4: bytes(64)})), "survivors alone")


def test_two_stories_of_who_survived_do_not_come_together():
    """The server tells half of the cohort that client 4 survived and the other half that it was dropped: nobody reveals a share."""
    play = Play(5, 3)
    truth = play.survivors()
    lie = write_survivors(play.session, (0, 1, 2, 3))
    signatures = {i: play.clients[i].consistency(truth if i in (0, 1) else lie) for i in range(4)}
    signed = {i: wire.read_records(play.session, message, Stage.CONSISTENCY_CHECK, i)[0][0] for i, message in signatures.items()}
    everybody = Request((0, 1, 2, 3, 4), (), signed)
    without = Request((0, 1, 2, 3), (4,), signed)
    refuses(play, 0, ask(play, everybody), "signature of client 2")
    refuses(play, 2, ask(play, without, 2), "signature of client 0")


def signed(play: Play, rosters: dict[int, bytes], sharers: dict[int, tuple[int, ...]], there: tuple[int, ...]) -> dict[int, bytes]:
    """Give every client a roster and an inbox of its own, and return the survivors' signatures."""
    session, clients = play.session, play.clients
    sealed = {i: dict(wire.read_records(session, clients[i].share(roster), Stage.SHARE_KEYS, i)) for i, roster in rosters.items()}
    for i in rosters:
        inbox = wire.write_records(session, Stage.INBOX, SERVER, {other: sealed[other][i] for other in sharers[i] if other != i}.items())
        clients[i].masked_code(inbox, play.codes[i])
    survivors = write_survivors(session, there)
    return {i: wire.read_records(session, clients[i].consistency(survivors), Stage.CONSISTENCY_CHECK, i)[0][0] for i in there}


@pytest.mark.parametrize("lies", [False, True])
def test_two_rosters_do_not_come_together(lies):
    """Half of the cohort is told of client 2 and the other half is not; who shared and who survived they are told alike."""
    play, there = Play(5, 3), (0, 1, 3, 4)
    roster = entries(play)
    whole, without = (write_roster(play.session, {i: roster[i] for i in who}) for who in (range(5), there))
    rosters = {0: whole, 1: whole} | dict.fromkeys((3, 4), without if lies else whole)
    request = Request(there, (), signed(play, rosters, dict.fromkeys(there, there), there))
    if lies:
        refuses(play, 0, ask(play, request), "signature of client 3")
        refuses(play, 3, ask(play, request, 3), "signature of client 0")
    else:
        assert all(dict(wire.read_records(play.session, ask(play, request, i)(), Stage.UNMASKING, i)).keys() == set(there) for i in there)


@pytest.mark.parametrize("lies", [False, True])
def test_two_lists_of_who_shared_do_not_come_together(lies):
    """Half of the cohort has shares of client 4, whose masks are then in their codes, and the other half was told that it sent none."""
    play, there = Play(5, 3), (0, 1, 2, 3)
    rosters = dict.fromkeys(range(5), write_roster(play.session, entries(play)))
    everybody = (0, 1, 2, 3, 4)
    sharers = dict.fromkeys(everybody, everybody) | dict.fromkeys((0, 1), there if lies else everybody)
    signatures = signed(play, rosters, sharers, there)
    with_four, without = Request(there, (4,), signatures), Request(there, (), signatures)
    if lies:
        refuses(play, 0, ask(play, without), "signature of client 2")
        refuses(play, 2, ask(play, with_four, 2), "signature of client 0")
    else:
        assert all(
            dict(wire.read_records(play.session, ask(play, with_four, i)(), Stage.UNMASKING, i)).keys() == set(everybody) for i in there
        )


def test_a_session_that_is_used_twice_opens_nothing_with_keys_of_the_first_time():
    """The clients begin anew, and the server puts in keys that two of them signed the first time."""
    play = Play(4, 3)
    old = entries(play)
    for i in (0, 1, 2):
        play.clients[i] = SecureClient(play.session, i, play.identities.of(i), play.directory, counting(9 + i))
    new = {i: read_keys(play.session, play.clients[i].advertise(), i) for i in (0, 1, 2)}
    truth = write_roster(play.session, new | {3: old[3]})
    mixed = write_roster(play.session, new | {1: old[1], 3: old[3]})
    begun_anew = play.client(3)
    begun_anew.advertise()
    with pytest.raises(ProtocolError, match="own keys"):
        begun_anew.share(truth)
    # The one that did not begin anew finds its own keys in either roster, and the shares fit.
    there = (0, 2, 3)
    request = Request(there, (), signed(play, {0: truth, 2: truth, 3: mixed}, dict.fromkeys(there, there), there))
    refuses(play, 0, ask(play, request), "signature of client 3")
    refuses(play, 3, ask(play, request, 3), "signature of client 0")


def test_a_second_request_is_refused():
    play = Play()
    request = play.request()
    play.clients[0].unmask(request)
    with pytest.raises(ProtocolError, match="nothing more in this session"):
        play.clients[0].unmask(request)
    answers_nothing_more(play, 0)


def test_messages_of_an_earlier_session_are_refused_at_every_stage():
    old, new = Play(seed=0), Play(seed=1)
    new.keys()
    refuses(new, 0, lambda: new.clients[0].share(old.roster()), "Expected session", MessageError)
    old, new = Play(seed=0), Play(seed=1)
    new.inboxes()
    refuses(new, 0, lambda: new.clients[0].masked_code(old.inboxes()[0], new.codes[0]), "Expected session", MessageError)
    old, new = Play(seed=0), Play(seed=1)
    new.survivors()
    refuses(new, 0, lambda: new.clients[0].consistency(old.survivors()), "Expected session", MessageError)
    old, new = Play(seed=0), Play(seed=1)
    new.request()
    refuses(new, 0, lambda: new.clients[0].unmask(old.request()), "Expected session", MessageError)


def test_stages_out_of_order_are_refused():
    play = Play()
    with pytest.raises(ProtocolError, match="Expected the advertise_keys stage but was asked for unmasking"):
        play.clients[0].unmask(b"")
    answers_nothing_more(play, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": b"\1" * 32}, "signature of client"),
        ({"model": b"\1" * 32}, "signature of client"),
        ({"broadcast": digest_context(Context(broadcast={"gain": 1e30}))}, "signature of client"),
        ({"training": b"\1" * 32}, "signature of client"),
        ({"codec": 78}, "codec fingerprint"),
        ({"round": 4}, "Expected round 4"),
        ({"threshold": 4}, "signature of client"),
        ({"format": session_of(4, 3, ((7, 5),), 2).format}, "signature of client"),
        ({"format": session_of(4, 3, ((15, 5),)).format}, "signature of client"),
    ],
    ids=["encoder", "model", "broadcast", "training", "codec", "round", "threshold", "largest weight", "range"],
)
def test_a_client_that_holds_something_else_does_not_take_part(changes, said):
    """A server that gives one client another model, encoder or gain than the rest, or counts otherwise, gets nothing from it."""
    play = Play()
    other = replace(play.session, **changes)
    play.clients[0] = play.client(0, other)
    own = read_keys(other, play.clients[0].advertise(), 0)
    rest = {i: read_keys(play.session, play.clients[i].advertise(), i) for i in (1, 2, 3)}
    roster = write_roster(play.session, {0: own} | rest)
    refuses(play, 0, lambda: play.clients[0].share(roster), said, MessageError)
    refuses(play, 1, lambda: play.clients[1].share(roster), "signature of client 0")


# -- dishonest clients -------------------------------------------------------------------------------------------------------------


def test_the_server_takes_no_keys_with_a_bad_signature():
    play = Play()
    keys = play.keys()
    forged = read_keys(play.session, keys[1], 1)._replace(mask=KeyPair(bytes(32)).public)
    with pytest.raises(ProtocolError, match="signature of client 1"):
        play.server.collect_keys(1, write_keys(play.session, 1, forged))
    play.server.collect_keys(1, keys[1])  # a message that raised is as good as not sent


def test_a_message_of_another_sender_is_refused_at_every_stage():
    play = Play()
    keys = play.keys()
    with pytest.raises(MessageError, match="Expected sender 2"):
        play.server.collect_keys(2, keys[1])
    play = Play()
    shares = play.shares()
    with pytest.raises(MessageError, match="Expected sender 2"):
        play.server.collect_shares(2, shares[1])
    play = Play()
    code = play.clients[1].masked_code(play.inboxes()[1], play.codes[1])
    with pytest.raises(MessageError, match="Expected sender 2"):
        play.server.collect_masked(2, code)
    play = Play()
    signature = play.clients[1].consistency(play.survivors())
    with pytest.raises(MessageError, match="Expected sender 2"):
        play.server.collect_signature(2, signature)
    play = Play()
    revealed = play.revealed()
    with pytest.raises(MessageError, match="Expected sender 2"):
        play.server.collect_unmasking(2, revealed[1])


def test_the_server_counts_nobody_twice():
    play = Play()
    for i, message in play.keys().items():
        play.server.collect_keys(i, message)
    with pytest.raises(ProtocolError, match="one advertise_keys message of client 3"):
        play.server.collect_keys(3, message)
    roster = play.server.roster()
    for i, client in play.clients.items():
        play.server.collect_shares(i, message := client.share(roster))
    with pytest.raises(ProtocolError, match="one share_keys message of client 3"):
        play.server.collect_shares(3, message)
    for i in play.server.sharers():
        play.server.collect_masked(i, message := play.clients[i].masked_code(play.server.inbox(i), play.codes[i]))
    with pytest.raises(ProtocolError, match="one masked_input message of client 3"):
        play.server.collect_masked(3, message)
    survivors = play.server.survivor_list()
    for i, client in play.clients.items():
        play.server.collect_signature(i, message := client.consistency(survivors))
    with pytest.raises(ProtocolError, match="one consistency_check message of client 3"):
        play.server.collect_signature(3, message)
    request = play.server.request()
    for i, client in play.clients.items():
        play.server.collect_unmasking(i, message := client.unmask(request))
    with pytest.raises(ProtocolError, match="one unmasking message of client 3"):
        play.server.collect_unmasking(3, message)
    assert (play.server.total()[0] == play.codes.sum(0)).all()
    with pytest.raises(ProtocolError, match="to be open"):
        play.server.total()


def test_late_messages_and_strangers_are_refused():
    play = Play(5, 3)
    keys = play.keys()
    for i in range(4):
        play.server.collect_keys(i, keys[i])
    with pytest.raises(ProtocolError, match="of those who take part but client 9"):
        play.server.collect_keys(9, keys[4])
    play.server.roster()
    with pytest.raises(ProtocolError, match="the stage is not open"):
        play.server.collect_keys(4, keys[4])
    with pytest.raises(ProtocolError, match="of those who take part but client 4"):
        play.server.collect_shares(4, keys[4])


def test_shares_for_another_list_are_refused():
    play = Play()
    shares = play.shares()
    sealed = dict(wire.read_records(play.session, shares[1], Stage.SHARE_KEYS, 1))
    sealed.pop(0)
    with pytest.raises(ProtocolError, match="client 1's shares for each"):
        play.server.collect_shares(1, wire.write_records(play.session, Stage.SHARE_KEYS, 1, sealed.items()))


def test_revealed_shares_of_another_list_are_refused():
    play = Play()
    revealed = dict(wire.read_records(play.session, play.revealed()[1], Stage.UNMASKING, 1))
    revealed.pop(0)
    with pytest.raises(ProtocolError, match="client 1's shares of everybody"):
        play.server.collect_unmasking(1, wire.write_records(play.session, Stage.UNMASKING, 1, revealed.items()))


def with_wrong_shares(play: Play, silent: tuple[int, ...], liars: tuple[int, ...], whose: int) -> None:
    messages = play.revealed(silent)
    for liar in liars:
        revealed = dict(wire.read_records(play.session, messages[liar], Stage.UNMASKING, liar))
        revealed[whose] = bytes([revealed[whose][0] ^ 1 + liar]) + revealed[whose][1:]
        messages[liar] = wire.write_records(play.session, Stage.UNMASKING, liar, revealed.items())
    for i, message in messages.items():
        play.server.collect_unmasking(i, message)


@pytest.mark.parametrize(
    ("silent", "liars", "whose"), [((), (1,), 2), ((), (0, 2), 2), ((6,), (0,), 6), ((6,), (5,), 6), ((5, 6), (4,), 1)]
)
def test_a_wrong_share_costs_its_sender_and_not_the_round(silent, liars, whose):
    """Shamir's sharing would make another secret of it without a word; others are tried, and those in the first choice are found out."""
    play = Play(7, 4)
    with_wrong_shares(play, silent, liars, whose)
    total = play.server.total()[0]
    assert (total == play.codes[[i for i in range(7) if i not in silent]].sum(0)).all()
    assert play.server.liars <= set(liars) and (min(liars) >= 4 or play.server.liars == set(liars))


@pytest.mark.parametrize(("silent", "whose", "said"), [((1,), 2, "committed to"), ((3,), 3, "the mask key of client 3")])
def test_a_wrong_share_that_no_other_replaces_ends_the_attempt(silent, whose, said):
    play = Play()
    with_wrong_shares(play, silent, (0,), whose)
    with pytest.raises(ProtocolError, match=f"{said}.*too many are corrupt"):
        play.server.total()


@pytest.mark.parametrize("changes", [{"channel": bytes(32)}, {"mask": bytes(32)}, "copied"], ids=["channel", "mask", "copied"])
def test_keys_that_clients_would_refuse_are_not_collected(changes):
    """One client with such keys, which it signed, would end the session of all others."""
    play = Play()
    sent = play.keys()
    for i in (0, 1):
        play.server.collect_keys(i, sent[i])
    keys = read_keys(play.session, sent[2], 2)
    forged = keys._replace(**({"mask": play.server.keys[0].mask} if changes == "copied" else changes))
    forged = forged._replace(signature=play.identities.of(2).sign(forged.signed(play.session, 2)))
    with pytest.raises(ProtocolError, match="in use already" if changes == "copied" else "low order"):
        play.server.collect_keys(2, write_keys(play.session, 2, forged))
    play.server.collect_keys(3, sent[3])
    roster = play.server.roster()
    assert sorted(play.server.keys) == [0, 1, 3]
    for i in (0, 1, 3):
        play.clients[i].share(roster)


def test_a_forged_signature_of_the_survivors_is_not_taken():
    play = Play()
    play.survivors()
    with pytest.raises(ProtocolError, match="signature of client 1"):
        play.server.collect_signature(1, wire.write_records(play.session, Stage.CONSISTENCY_CHECK, 1, [(bytes(64),)]))


@pytest.mark.parametrize("stage", range(5))
def test_below_the_threshold_the_server_gets_nothing_at_any_stage(stage):
    play = Play(4, 3)
    server = play.server
    close = [server.roster, server.sharers, server.survivor_list, server.request, server.total][stage]
    said = [play.keys, play.shares, None, None, play.revealed][stage]
    collect = [server.collect_keys, server.collect_shares, None, None, server.collect_unmasking][stage]
    if stage == 2:
        inboxes = play.inboxes()
        for i in (0, 1):
            server.collect_masked(i, play.clients[i].masked_code(inboxes[i], play.codes[i]))
    elif stage == 3:
        survivors = play.survivors()
        for i in (0, 1):
            server.collect_signature(i, play.clients[i].consistency(survivors))
    else:
        messages = said()
        for i in (0, 1):
            collect(i, messages[i])
    with pytest.raises(ProtocolError, match="at least 3 clients"):
        close()
    for again in (server.roster, server.sharers, server.survivor_list, server.request, server.total):
        with pytest.raises(ProtocolError):
            again()


def test_what_the_server_holds_opens_no_single_code():
    """With every share that a whole protocol gives it, the server still lacks the pair masks of the survivors."""
    play = Play(4, 3, limits=((7, 200),))
    messages = play.revealed()
    for i, message in messages.items():
        play.server.collect_unmasking(i, message)
    assert (play.server.total()[0] == play.codes.sum(0)).all()
    seeds = {i: combine({who: play.server._unmasking[who][i] for who in range(3)}) for i in range(4)}
    again = Play(4, 3, limits=((7, 200),))
    words = masked(again)  # the same entropy: the same masks
    for i in range(4):
        add_mask(words[i], play.session.self_mask(seeds[i], i), play.session.format.modulus, negative=True)
        assert (again.session.format.integers(words[i]) == again.codes[i]).mean() < 0.1
    # What was taken off was each client's own mask: all that is left are masks of pairs, and in the sum none of those.
    together = sum(words.values()) % play.session.format.modulus
    assert (again.session.format.integers(together) == again.codes.sum(0)).all()


@pytest.mark.parametrize("clients", [3, 4, 5, 6])
def test_cohorts_smaller_than_declared_work_down_to_the_threshold(clients):
    session = session_of(6, 4)
    expect(session, random_codes(session)[:clients], [1] * clients, {})


def test_a_client_in_two_sessions_uses_no_key_twice():
    """Two attempts at one round: every key, commitment and sealed share differs."""
    first, second = Play(seed=0), Play(seed=1)
    one, two = (read_roster(play.session, play.roster()) for play in (first, second))
    for i in one:
        for field in ("channel", "mask", "commitment", "signature"):
            assert getattr(one[i], field) != getattr(two[i], field)


def test_seeds_and_keys_are_forgotten_once_the_masks_are_on():
    """What is left are the shares, the own ones among them, which the end of the protocol needs."""
    play = Play()
    inbox = play.inboxes()[0]
    client = play.clients[0]
    assert all(client._seeds) and client._pair_masks and client._channels
    client.masked_code(inbox, play.codes[0])
    assert client._seeds == (b"", b"") and not client._pair_masks and not client._channels
    assert client._mask is None and client._channel is None and len(client._shares) == 4


def test_default_entropy_makes_new_keys_every_time():
    play = Play()
    made = [SecureClient(play.session, 0, play.identities.of(0), play.directory).advertise() for _ in range(2)]
    keys = [read_keys(play.session, message, 0) for message in made]
    assert len({key for each in keys for key in (each.channel, each.mask, each.commitment)}) == 6
