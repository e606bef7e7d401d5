"""Buckets through shared memory and through a socket, without vLLM: all arrives, and nobody else gets anything."""

import hmac
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from llmac.engines.weight_memory import SharedMemory, SharedMemoryReader
from llmac.engines.weight_sender import WeightSender, unpacked
from llmac.engines.weight_socket import WeightSocket, WeightSocketReader
from llmac.errors import EngineError

READERS = {"shm": SharedMemoryReader, "tcp": WeightSocketReader}


@pytest.fixture(params=["shm", "tcp"])
def pair(request):
    """A sender of buckets of 1,000 bytes, and a reader it was introduced to."""
    sender = WeightSender(request.param, 1000)
    reader = READERS[request.param](sender.init_info()["introduction"])
    yield sender, reader
    reader.close()
    sender.close()
    sender.close()


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        ("scalar", torch.tensor(3.5)),
        ("odd", torch.randn(7, generator=generator)),
        ("half", torch.randn(5, 3, generator=generator).bfloat16()),
        ("counts", torch.arange(9)),
        ("empty", torch.empty(0, 4)),
        ("turned", torch.randn(6, 8, generator=generator).T),
        ("large", torch.randn(30, 30, generator=generator)),
        ("small", torch.randn(2, generator=generator)),
    ]


def read(reader, bucket):
    memory = reader.read(bucket["where"], bucket["size"])
    fields = (bucket[field] for field in ("names", "dtypes", "shapes", "offsets"))
    return [(name, tensor.clone()) for name, tensor in unpacked(memory, *fields)]


def check_same(received, sent):
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, mine), (name, theirs) in zip(received, sent, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name


def test_what_is_read_is_what_was_sent_update_after_update(pair):
    sender, reader = pair
    for update in range(3):
        buckets = []
        received = []
        for bucket in sender.buckets(weights(update)):
            buckets.append(bucket)
            received += read(reader, bucket)
        check_same(received, weights(update))
        assert [bucket["number"] for bucket in buckets] == list(range(len(buckets)))
        assert [bucket["last"] for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
        assert {bucket["update"] for bucket in buckets} == {update + 1}


def test_a_bucket_can_be_read_until_the_next_but_one_is_asked_for(pair):
    sender, reader = pair
    sent = [(str(place), torch.full((250,), float(place))) for place in range(5)]
    received = []
    before = None
    for bucket in sender.buckets(sent):
        if before is not None:
            received += read(reader, before)
        before = bucket
    check_same(received + read(reader, before), sent)


def test_buckets_keep_their_size_unless_one_tensor_is_larger(pair):
    sender, _ = pair
    sent = [(str(place), torch.zeros(100)) for place in range(5)] + [("large", torch.zeros(999))]
    names = [bucket["names"] for bucket in sender.buckets(sent)]
    assert names == [["0", "1"], ["2", "3"], ["4"], ["large"]]


def test_a_bucket_that_outgrows_its_memory_is_read_from_the_new_one(pair):
    sender, reader = pair
    for count in (100, 900, 100, 2000):
        sent = [("a", torch.full((count,), float(count)))]
        (bucket,) = sender.buckets(sent)
        check_same(read(reader, bucket), sent)


def test_the_stream_is_asked_for_a_tensor_only_when_the_one_before_was_copied(pair):
    sender, reader = pair

    def one_buffer():
        buffer = torch.empty(50)
        for place in range(12):
            yield str(place), buffer.fill_(place)

    received = [pair for bucket in sender.buckets(one_buffer()) for pair in read(reader, bucket)]
    check_same(received, [(str(place), torch.full((50,), float(place))) for place in range(12)])


def test_an_update_given_up_in_the_middle_does_not_disturb_the_next(pair):
    sender, reader = pair
    given_up = sender.buckets(weights(1))
    next(given_up)
    given_up.close()
    received = [pair for bucket in sender.buckets(weights(2)) for pair in read(reader, bucket)]
    check_same(received, weights(2))


def test_several_readers_read_the_same_bucket(pair):
    sender, reader = pair
    other = type(reader)(sender.init_info()["introduction"])
    for bucket in sender.buckets(weights()):
        check_same(read(other, bucket), read(reader, bucket))
    other.close()


def test_a_reader_that_starts_later_gets_the_next_update(pair):
    sender, reader = pair
    for bucket in sender.buckets(weights(1)):
        read(reader, bucket)
    late = type(reader)(sender.init_info()["introduction"])
    check_same(
        [pair for bucket in sender.buckets(weights(2)) for pair in read(late, bucket)], weights(2)
    )
    late.close()


def test_an_empty_stream_has_no_buckets(pair):
    sender, _ = pair
    assert list(sender.buckets([])) == []


def test_shared_memory_is_mapped_once_and_read_in_place():
    memory = SharedMemory()
    memory.room(0, 100)[:4] = torch.tensor([1, 2, 3, 4])
    reader = SharedMemoryReader(memory.introduction())
    first = reader.read(memory.where(0), 4)
    memory.room(0, 50)[:4] = 7
    assert reader.read(memory.where(0), 4).data_ptr() == first.data_ptr()
    assert first.tolist() == [7, 7, 7, 7]
    memory.close()


def test_shared_memory_leaves_no_name_and_no_open_file():
    files, names = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    sender = WeightSender("shm", 1 << 20)
    reader = SharedMemoryReader(sender.init_info()["introduction"])
    for bucket in sender.buckets(weights()):
        read(reader, bucket)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if "llmac" in name]
    reader.close()
    sender.close()
    assert set(os.listdir("/proc/self/fd")) <= files


def test_memory_of_an_owner_that_is_gone_is_refused():
    memory = SharedMemory()
    introduction = memory.introduction()
    memory.close()
    with pytest.raises(EngineError, match=r"cannot be opened.*weight_transport=tcp"):
        SharedMemoryReader(introduction)


def test_another_file_under_the_same_number_is_refused(tmp_path):
    memory = SharedMemory()
    introduction = {**memory.introduction(), "path": f"/proc/{os.getpid()}/fd/{_open(tmp_path)}"}
    with pytest.raises(EngineError, match="is not the trainer's memory"):
        SharedMemoryReader(introduction)
    memory.close()


def test_less_memory_than_announced_is_refused():
    memory = SharedMemory()
    reader = SharedMemoryReader(memory.introduction())
    memory.room(0, 10)
    with pytest.raises(EngineError, match="10 bytes; its bucket of weights needs 11"):
        reader.read(memory.where(0), 11)
    memory.close()


def test_who_does_not_know_the_secret_reads_nothing():
    owner = WeightSocket("127.0.0.1")
    with pytest.raises(
        EngineError, match=r"reading weights from the trainer .* closed with 40 of 40"
    ):
        WeightSocketReader({**owner.introduction(), "secret": "00" * 32})
    owner.close()


def test_who_does_not_know_the_secret_feeds_nothing():
    """An impostor listens where the trainer listened, and answers as well as it can."""
    impostor = _Listener(
        lambda ask: struct.pack("!Q32s", 0, hmac.digest(b"guess", b"answer" + ask[:16], "sha256"))
    )
    with pytest.raises(EngineError, match="is not from the trainer"):
        WeightSocketReader(impostor.introduction())
    impostor.close()


def test_the_secret_itself_does_not_travel():
    listener = _Listener(lambda ask: b"")
    with pytest.raises(EngineError):
        WeightSocketReader(listener.introduction())
    assert listener.asked
    assert bytes.fromhex(listener.introduction()["secret"]) not in listener.asked
    listener.close()


def test_an_old_answer_is_not_taken_for_a_new_question():
    owner = WeightSocket("127.0.0.1")
    introduction = owner.introduction()
    heard = []

    def pass_on(ask):
        with socket.create_connection((introduction["host"], introduction["port"])) as connection:
            connection.sendall(ask)
            heard.append(connection.recv(40, socket.MSG_WAITALL))
        return heard[0]

    between = _Listener(pass_on)
    towards = {**introduction, "port": between.port}
    WeightSocketReader(towards)
    with pytest.raises(EngineError, match="is not from the trainer"):
        WeightSocketReader(towards)
    between.close()
    owner.close()


def test_a_bucket_that_is_not_offered_any_more_is_refused():
    sender = WeightSender("tcp", 100)
    reader = WeightSocketReader(sender.init_info()["introduction"])
    first, *_ = sender.buckets([(str(place), torch.zeros(25)) for place in range(3)])
    with pytest.raises(EngineError, match="offers other weights now"):
        reader.read(first["where"], first["size"])
    sender.close()


def test_a_bucket_that_breaks_off_is_refused():
    secret = b"s" * 32

    def half(ask):
        return (
            _answer(secret, ask, 100) + b"x" * 60
            if ask[16:24] != bytes(8)
            else _answer(secret, ask, 0)
        )

    listener = _Listener(half, secret)
    reader = WeightSocketReader(listener.introduction())
    with pytest.raises(EngineError, match="closed with 40 of 100 bytes missing"):
        reader.read({"key": 1}, 100)
    with pytest.raises(EngineError, match="100 bytes are offered; the bucket needs 101"):
        reader.read({"key": 1}, 101)
    listener.close()


def test_an_owner_that_hangs_is_given_up():
    given_up = threading.Event()
    silent = _Listener(lambda ask: given_up.wait(10) and b"")
    started = time.monotonic()
    with pytest.raises(EngineError, match="TimeoutError"):
        WeightSocketReader(silent.introduction(), stall_seconds=0.2)
    assert time.monotonic() - started < 2
    given_up.set()
    silent.close()


def test_an_owner_that_has_ended_is_named():
    owner = WeightSocket("127.0.0.1")
    introduction = owner.introduction()
    owner.close()
    with pytest.raises(EngineError, match=f"127.0.0.1:{introduction['port']} failed: Connection"):
        WeightSocketReader(introduction)


def test_an_address_of_another_machine_cannot_be_offered():
    with pytest.raises(EngineError, match=r"cannot offer weights at 192\.0\.2\.1"):
        WeightSender("tcp", 100, host="192.0.2.1")


def test_neither_half_of_the_transport_needs_vllm():
    code = "import sys; import llmac.engines.weight_sender, llmac.engines.vllm_launch; assert 'vllm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


class _Listener:
    """Somebody on a port: answers the 56 bytes of a question as told."""

    def __init__(self, answer, secret=b"k" * 32):
        self._server = socket.create_server(("127.0.0.1", 0))
        self._answer, self._secret = answer, secret
        self.port = self._server.getsockname()[1]
        self.asked = b""
        threading.Thread(target=self._listen, daemon=True).start()

    def introduction(self):
        return {"host": "127.0.0.1", "port": self.port, "secret": self._secret.hex()}

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _listen(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                ask = connection.recv(56, socket.MSG_WAITALL)
                self.asked += ask
                connection.sendall(self._answer(ask))


def _answer(secret, ask, size):
    proof = hmac.digest(secret, b"answer" + ask[:16] + struct.pack("!Q", size), "sha256")
    return struct.pack("!Q32s", size, proof)


def _open(folder):
    path = folder / "file"
    path.write_bytes(b"x")
    return os.open(path, os.O_RDONLY)
