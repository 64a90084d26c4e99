"""`gcloud` and `systemd-run` without Google and systemd: `python fake_cloud.py PROGRAM WORDS...`.

`gcloud` keeps its world in the folder FAKE_CLOUD. Files that a test may write there beforehand:

    request         states of the queued resource, one a line: each look takes one, the last stays.
                    `STATE until PATH` stays until PATH exists in the bucket
    node            likewise for every node; default: READY
    creations/N     becomes `request` at the Nth creation (from 0); default: ACTIVE at once
    failures        parts of commands; a command with such a part fails, and takes the line away
    answers/N       what the Nth question for the status of the hosts is answered: for each host
                    STATE CODE STEP STOP_REQUESTED, where the last ones may be missing
    hosts           number of hosts a node; ssh then runs its command on them, which is folders here
    leftovers       names that stay in the lists whatever is deleted

and what it leaves: `calls` (of the user's machine, words separated by tabs) and `gs/` (buckets).
With the machines, the file `hold` of fake_train.py goes too.
"""

from __future__ import annotations

# Called hundreds of times: what is slow to import is imported where it is needed, or not at all.
import os
import signal
import sys
import time

WORLD = os.environ["FAKE_CLOUD"]


def here(name: str) -> str:
    return f"{WORLD}/{name}"


def read(name: str) -> str | None:
    try:
        with open(here(name)) as file:
            return file.read()
    except FileNotFoundError:
        return None


def write(name: str, text: str, mode: str = "w") -> None:
    with open(here(name), mode) as file:
        file.write(text)


def take(name: str) -> str | None:
    """The first line of a file, which goes unless it is the last; None without a file."""
    text = read(name)
    if text is None:
        return None
    first, *rest = text.splitlines()
    state, until, place = first.partition(" until ")
    if until and not os.path.exists(here(f"gs/{place}")):
        return state
    if rest:
        write(name, "".join(f"{line}\n" for line in rest))
    return take(name) if until else state


def fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


def gcloud(words: list[str]) -> int:
    if "FAKE_HOST" not in os.environ:
        write("calls", "\t".join(words) + "\n", "a")
        part, *rest = (read("failures") or "").splitlines() or [""]
        if part and part in " ".join(words):
            write("failures", "".join(f"{line}\n" for line in rest))
            return fail("UNAVAILABLE: The service is currently unavailable.")
    if words[0] == "storage":
        return storage(words[1], words[2:])
    kind, verb, *rest = words[words.index("tpus") + 1 :]
    return queued_resources(verb, rest) if kind == "queued-resources" else tpu_vm(verb, rest)


def queued_resources(verb: str, words: list[str]) -> int:
    if verb == "describe":
        state = take("request")
        if state is None:
            return fail(f"NOT_FOUND: Resource '{words[0]}' was not found")
        print(state)
    elif verb == "create":
        if read("request") is not None:
            return fail("ALREADY_EXISTS")
        number = int(read("created") or 0)
        write("created", str(number + 1))
        write("request", read(f"creations/{number}") or "ACTIVE\n")
    elif verb == "delete":
        assert "--force" in words
        os.unlink(here("request"))
        break_machines()
    elif verb == "list":
        print_names("request", words)
    return 0


def break_machines() -> None:
    import shutil

    if os.path.exists(here("machines")):
        for machine in os.listdir(here("machines")):
            if pid := read(f"machines/{machine}/unit.pid"):
                os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(here("machines"), ignore_errors=True)
    for name in ("node", "hold"):
        if os.path.exists(here(name)):
            os.unlink(here(name))


def tpu_vm(verb: str, words: list[str]) -> int:
    if verb == "describe":
        if read("node") is None and read("request") is None:
            return fail(f"NOT_FOUND: Resource '{words[0]}' was not found")
        print(take("node") or "READY")
    elif verb == "delete":
        os.unlink(here("node"))
    elif verb == "list":
        print_names("node", words)
    elif verb == "ssh":
        return ssh(words)
    return 0


def print_names(kind: str, words: list[str]) -> None:
    assert "--format=value(name.basename())" in words
    print("somebody-elses")
    print(read("leftovers") or ("ddk-1" if read(kind) else ""))


def ssh(words: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in words if "=" in word)
    command, worker, node = options["command"], options["worker"], words[0]
    hosts = read("hosts")
    if hosts is None:
        if "host.sh status" in command:
            answer()
        return 0
    import subprocess

    workers = range(int(hosts)) if worker == "all" else [int(worker)]
    running = []
    for number in workers:
        name = f"{node}-w-{number}"
        home = here(f"machines/{name}")
        os.makedirs(home, exist_ok=True)
        env = os.environ | {"HOME": home, "FAKE_HOST": name}
        running.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=env))
    return max(process.wait() for process in running)


def answer() -> None:
    """Print a line for each host; the last answer stays."""
    first, *rest = sorted(os.listdir(here("answers")), key=int)
    for number, line in enumerate((read(f"answers/{first}") or "").splitlines()):
        words = line.split()
        state, code, step, stop = words + ["-", "-", "no"][len(words) - 1 :]
        print(
            f"ddk-status host=w{number} state={state} code={code} step={step} restarts=0 since=- "
            f"stop_requested={stop}"
        )
    if rest:
        os.unlink(here(f"answers/{first}"))


def storage(verb: str, words: list[str]) -> int:
    import shutil

    names = [word for word in words if not word.startswith("--")]
    places = [here(f"gs/{name[5:]}") if name.startswith("gs://") else name for name in names]
    missing = next((p for p in places[: 1 + (verb == "objects")] if not os.path.exists(p)), None)
    if verb == "cp":
        os.makedirs(os.path.dirname(os.path.abspath(places[1])), exist_ok=True)
        if names[0] == "-":
            with open(places[1], "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        elif missing:
            return fail(f"{names[0]} not found: 404.")
        else:
            shutil.copyfile(*places)
    elif verb == "rsync":
        shutil.copytree(*places, dirs_exist_ok=True)
    elif verb == "ls":
        if missing:
            return fail("One or more URLs matched no objects.")
        found = os.listdir(places[0]) if os.path.isdir(places[0]) else [""]
        print("".join(f"{names[0]}{name}/\n" for name in found), end="")
    elif verb == "objects":
        if not os.path.exists(places[1]):
            return fail(f"{names[1]} not found: 404.")
        print(names[1])
    return 0


def systemd_run(words: list[str]) -> int:
    """Start a service: `unit.pid` is there for as long as it runs."""
    import subprocess

    unit = f"{os.environ['HOME']}/unit.pid"
    if os.path.exists(unit):
        return fail("Unit was already loaded or has a fragment file.")
    end = words.index("--")
    options = [word[2:].partition("=") for word in words[:end]]
    settings = dict(value.split("=", 1) for key, _, value in options if key == "setenv")
    (folder,) = [value for key, _, value in options if key == "working-directory"]
    with open(f"{os.environ['HOME']}/systemd-run.txt", "w") as file:
        file.write("\n".join(words[:end]))
    service = f'"$@" & echo $! >{unit}.new; mv {unit}.new {unit}; wait; rm {unit}'
    subprocess.Popen(
        ["sh", "-c", service, "service", *words[end + 1 :]],
        cwd=folder,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not os.path.exists(unit):
        time.sleep(0.002)
    return 0


PROGRAMS = {"gcloud": gcloud, "systemd-run": systemd_run}

if __name__ == "__main__":
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
