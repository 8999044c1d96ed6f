//! `headwater attach`, `redirect --device` and `detach`, with the kernel's own client in a virtual machine.
//!
//! One boot for one script: the servers run in the guest as well, so that the script can kill them. What is checked is
//! printed as `name: what came of it`, and looked at here.

use crate::support::Scratch;
use crate::support::guest::run_with_headwater;

/// Images, servers, and a reader that goes on reading and comparing.
///
/// `a` and `b` hold the same, `c` another image of the same size, `d` half of it.
const SETTING: &str = r#"
echo
mkdir -p /srv /run /tmp
cd /srv
dd if=/dev/urandom of=a bs=1M count=8 2>/dev/null
cp a b
dd if=/dev/urandom of=c bs=1M count=8 2>/dev/null
dd if=a of=d bs=1M count=4 2>/dev/null
cp a writable
for image in a b c d; do headwater index $image >/dev/null 2>&1; done
sum=$(sha256sum <a)

# serve NAME PORT: a server in the background; says when it listens.
serve() {
    [ $1 = writable ] && mode= || mode=--read-only
    rm -f /run/said.$2
    mkfifo /run/said.$2
    headwater serve x=/srv/$1 $mode --listen 127.0.0.1:$2 --unix /run/$2.sock --admin none >/run/said.$2 2>>/run/log.$2 &
    echo $! >/run/pid.$2
    head -n 1 </run/said.$2 >/dev/null
}
stop() { kill -9 $(cat /run/pid.$1); wait $(cat /run/pid.$1) || true; }

# read_on DEVICE NAME: reads the device again and again until /run/reading is gone, twice at least.
read_on() {
    touch /run/reading
    (
        reads=0 wrong=0
        while [ -e /run/reading ] || [ $reads -lt 2 ]; do
            blockdev --flushbufs $1
            [ "$(sha256sum <$1 2>>/run/errors)" = "$sum" ] || wrong=$((wrong + 1))
            reads=$((reads + 1))
        done
        echo "$2: some reads, $wrong wrong"
    ) &
    reader=$!
}
read_off() { rm /run/reading; wait $reader; }

# says NAME COMMAND...: its status, and what it printed.
says() {
    name=$1
    shift
    status=0
    "$@" >/run/out 2>&1 || status=$?
    echo "$name: status $status: $(tr '\n' ' ' </run/out)"
}
"#;

fn run(scratch: &Scratch, script: &str) -> String {
    let printed = run_with_headwater(scratch, &format!("{SETTING}{script}"));
    // Kept for whoever wants to see it: nextest shows it for a failing test.
    eprintln!("{printed}");
    printed
}

#[track_caller]
fn assert_said(printed: &str, name: &str, words: &[&str]) {
    let line = printed.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    let line = line.unwrap_or_else(|| panic!("nothing was said of {name}"));
    for word in words {
        assert!(line.contains(word), "{name}: {line:?} does not have {word:?}");
    }
}

#[test]
fn a_device_that_we_attached_is_moved_while_it_is_read() {
    let scratch = Scratch::new();
    let printed = run(
        &scratch,
        r#"
serve a 1001
serve b 1002
serve c 1003
serve d 1004
serve writable 1005
# What is lost with a server that is killed is asked for again after this time.
says attached headwater attach nbd://127.0.0.1:1001/x /dev/nbd0 --timeout 5s
echo "size: $(blockdev --getsize64 /dev/nbd0) read-only $(blockdev --getro /dev/nbd0) $(cat /sys/block/nbd0/backend)"
says mode stat -c %a /run/headwater/nbd0.json
says again headwater attach nbd://127.0.0.1:1001/x /dev/nbd0
says free headwater attach nbd+unix:///x?socket=/run/1001.sock --connections 4

read_on /dev/nbd0 moved-2
for round in 1 2 3 4 5 6 7 8 9 10; do
    for port in 1002 1001; do
        headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:$port/x --json >/run/out || echo "round $round: $?"
        grep -o '"way": "[a-z]*"' /run/out >>/run/ways
        grep -o '"pause_ms": [0-9.]*' /run/out >>/run/pauses
    done
done
read_off
echo "ways: $(sort /run/ways | uniq -c | tr -s ' ' | tr '\n' ' ')"
echo "pauses: $(grep -o '[0-9.]*$' /run/pauses | sort -n | tr '\n' ' ')"

read_on /dev/nbd1 moved-unix-4
for round in 1 2 3 4 5 6 7 8 9 10; do
    for port in 1002 1001; do
        says unix-$port headwater redirect --device /dev/nbd1 --to "nbd+unix:///x?socket=/run/$port.sock"
        [ $status = 0 ] || echo "round $round: $status"
    done
done
read_off

says other-image headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1003/x --force
says other-size headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1004/x --force
says unknown headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1005/x
says nobody headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1999/x
says not-attached headwater redirect --device /dev/nbd3 --to nbd://127.0.0.1:1002/x
says second-choice headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1999/x,nbd://127.0.0.1:1002/x
grep -q 127.0.0.1:1002 /run/headwater/nbd0.json && echo "record: has the new server"
[ "$(cat /sys/block/nbd0/queue/io_timeout)" = 5000 ] && echo "time-out: set back"

# Its server dies and comes back: the keeper connects anew.
read_on /dev/nbd0 killed
stop 1002
serve b 1002
dd if=/dev/nbd0 of=/dev/null bs=1M iflag=direct 2>&1 | tail -n 1
read_off
until grep -q '"reconnected": 2' /run/headwater/nbd0.json; do read -t 1 nothing </dev/zero || true; done
echo "keeper: connected both anew"

# The old server is dead, and does not come back: the new one takes over all the same.
read_on /dev/nbd0 dead
stop 1002
says dead-server headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1001/x
read_off
[ "$(sha256sum </dev/nbd0)" = "$sum" ] && echo "at the end: right"
[ -s /run/errors ] && cat /run/errors
echo "errors: $(dmesg | grep -c 'I/O error') $(grep -c . /run/errors)"

says detached headwater detach /dev/nbd0
says detached-again headwater detach /dev/nbd0
says detached-1 headwater detach /dev/nbd1
ls /run/headwater/*.json 2>/dev/null && echo "records: left over"
while grep -qs '[k]eep' /proc/[0-9]*/cmdline; do read -t 1 nothing </dev/zero || true; done
echo "keepers: gone"
"#,
    );
    assert_said(&printed, "attached", &["status 0", "/dev/nbd0"]);
    assert_said(&printed, "size", &["8388608 read-only 1 blake3-"]);
    assert_said(&printed, "mode", &["600"]);
    assert_said(&printed, "again", &["status 1", "in use"]);
    assert_said(&printed, "free", &["status 0", "/dev/nbd1"]);
    assert_said(&printed, "moved-2", &["some reads, 0 wrong"]);
    assert!(!printed.contains("\nround "), "a move has failed");
    assert_said(&printed, "ways", &["40 \"way\": \"drained\""]);
    assert_said(&printed, "moved-unix-4", &["some reads, 0 wrong"]);
    assert_said(&printed, "unix-1002", &["status 0", "drained"]);
    assert_said(&printed, "other-image", &["status 1", "it holds blake3-"]);
    assert_said(&printed, "other-size", &["status 1", "4194304 bytes"]);
    assert_said(&printed, "unknown", &["status 1", "--force"]);
    assert_said(&printed, "nobody", &["status 1", "cannot connect"]);
    assert_said(&printed, "not-attached", &["status 1", "not attached"]);
    assert_said(&printed, "second-choice", &["status 0"]);
    assert_said(&printed, "record", &["has the new server"]);
    assert_said(&printed, "time-out", &["set back"]);
    assert_said(&printed, "killed", &["some reads, 0 wrong"]);
    assert_said(&printed, "keeper", &["connected both anew"]);
    assert_said(&printed, "dead", &["some reads, 0 wrong"]);
    assert_said(&printed, "dead-server", &["status 0", "dead"]);
    assert_said(&printed, "at the end", &["right"]);
    assert_said(&printed, "errors", &["0 0"]);
    assert_said(&printed, "detached", &["status 0"]);
    assert_said(&printed, "detached-again", &["status 1", "not attached"]);
    assert_said(&printed, "detached-1", &["status 0"]);
    assert!(!printed.contains("records: left over"));
    assert_said(&printed, "keepers", &["gone"]);
}

#[test]
fn a_device_that_nbd_client_attached_is_moved_while_it_is_read() {
    let scratch = Scratch::new();
    let printed = run(
        &scratch,
        r#"
serve a 1001
serve b 1002
nbd-client -N x -C 2 127.0.0.1 1001 /dev/nbd0 >/dev/null 2>&1
says unsure headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1002/x
read_on /dev/nbd0 moved
for round in 1 2 3 4 5 6 7 8 9 10; do
    for port in 1002 1001; do
        says moved-$round-$port headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:$port/x --force
        [ $status = 0 ] || echo "round $round: $status"
    done
done
read_off
nbd-client -d /dev/nbd0

# More connections than there are processors.
nbd-client -N x -C 4 127.0.0.1 1001 /dev/nbd1 >/dev/null 2>&1
read_on /dev/nbd1 four
for round in 1 2 3 4 5 6 7 8 9 10; do
    for port in 1002 1001; do
        says moved-4 headwater redirect --device /dev/nbd1 --to nbd://127.0.0.1:$port/x --force
        [ $status = 0 ] || echo "round $round: $status"
    done
done
read_off

# A second one at the same server: nothing can tell whose connections are whose.
nbd-client -N x 127.0.0.1 1001 /dev/nbd0 >/dev/null 2>&1
nbd-client -N x 127.0.0.1 1001 /dev/nbd2 >/dev/null 2>&1
says ambiguous headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1002/x --force
says ambiguous-from headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1002/x --force --from nbd://127.0.0.1:1001/x
nbd-client -d /dev/nbd2
nbd-client -d /dev/nbd0

# On a unix socket, and by ioctl: it cannot be moved.
nbd-client -N x -unix /run/1001.sock /dev/nbd0 >/dev/null 2>&1
says unix headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1002/x --force
nbd-client -d /dev/nbd0
nbd-client -N x -L 127.0.0.1 1001 /dev/nbd0 >/dev/null 2>&1
says ioctl headwater redirect --device /dev/nbd0 --to nbd://127.0.0.1:1002/x --force
nbd-client -d /dev/nbd0
echo "errors: $(dmesg | grep -c 'I/O error')"
"#,
    );
    assert_said(&printed, "unsure", &["status 1", "not known", "--force"]);
    assert_said(&printed, "moved", &["some reads, 0 wrong"]);
    assert_said(&printed, "moved-1-1002", &["status 0", "cut", "another program"]);
    assert_said(&printed, "moved-1-1001", &["status 0", "drained"]);
    assert_said(&printed, "moved-10-1001", &["status 0", "drained"]);
    assert!(!printed.contains("\nround "), "a move has failed");
    assert_said(&printed, "four", &["some reads, 0 wrong"]);
    assert_said(&printed, "moved-4", &["status 0"]);
    assert_said(&printed, "ambiguous", &["status 1", "not certain"]);
    assert_said(&printed, "ambiguous-from", &["status 1", "not certain"]);
    assert_said(&printed, "unix", &["status 1", "unix"]);
    assert_said(&printed, "ioctl", &["status 1", "ioctl"]);
    assert_said(&printed, "errors", &["0"]);
}
