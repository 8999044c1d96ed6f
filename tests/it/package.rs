//! What the package brings: pages that man(1) understands, completions that shells take, units that systemd takes.
//!
//! `tools/package/try` installs the whole in a system of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Scratch, run};

/// Of 10, in tenths; `systemd-analyze security` counts what a unit could reach.
const EXPOSURE: &str = "20";

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_headwater"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files in a directory by name.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// Commands as `--help` lists them.
fn commands(arguments: &[&str]) -> Vec<String> {
    let help = run(program().args(arguments).arg("--help"));
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // What goes on in the next line stands further to the right.
    let first_words = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let words = first_words.filter_map(|line| line.split_whitespace().next());
    words.filter(|word| *word != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_has_a_page_that_man_shows_without_a_warning() {
    let scratch = Scratch::new();
    let place = scratch.path("man1");
    run(program().arg("man").arg(&place));
    let mut expected: Vec<_> = commands(&[]).iter().map(|command| format!("headwater-{command}.1")).collect();
    expected.extend(commands(&["profile"]).iter().map(|command| format!("headwater-profile-{command}.1")));
    expected.push("headwater.1".to_owned());
    expected.sort();
    let pages = files(&place);
    assert_eq!(pages.iter().map(|page| name(page)).collect::<Vec<_>>(), expected);
    for page in &pages {
        let mut command = Command::new("man");
        command.args(["--warnings", "--encoding=UTF-8", "--local-file"]).arg(page);
        let shown = command.env("MANWIDTH", "90").env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output().unwrap();
        let complaints = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success() && complaints.is_empty(), "{}: {complaints}", page.display());
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(text.contains("SYNOPSIS") && text.contains("SEE ALSO"), "{text}");
    }
}

#[test]
fn shells_take_the_completions() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish"] {
        let file = scratch.path(shell);
        fs::write(&file, run(program().args(["completions", shell]))).unwrap();
        run(Command::new(shell).arg(if shell == "fish" { "--no-execute" } else { "-n" }).arg(&file));
    }
    let asked = "source \"$0\"; COMP_WORDS=(headwater --log-level debug mir); COMP_CWORD=3
        _headwater headwater mir debug; echo \"${COMPREPLY[@]}\"";
    let found = run(Command::new("bash").args(["-c", asked]).arg(scratch.path("bash")));
    assert_eq!(found.trim(), "mirror");
}

#[test]
fn units_are_what_systemd_expects_and_reach_little() {
    let scratch = Scratch::new();
    let units = files(&root().join("tools/package/systemd"));
    assert_eq!(units.len(), 4);
    let mut copies = Vec::new();
    for unit in &units {
        // The program is where it was built.
        let text = fs::read_to_string(unit).unwrap().replace("/usr/bin/headwater", env!("CARGO_BIN_EXE_headwater"));
        copies.push(scratch.file(name(unit), text.as_bytes()));
    }
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&copies).output().unwrap();
    let complaints = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && complaints.is_empty(), "{complaints}");
    for service in copies.iter().filter(|unit| unit.extension().is_some_and(|kind| kind == "service")) {
        let threshold = format!("--threshold={EXPOSURE}");
        run(Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager", &threshold])
            .arg(service));
    }
}

#[test]
fn what_the_package_brings_is_there() {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let package = &manifest["package"]["metadata"]["deb"];
    let mut made = 0;
    for asset in package["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        if source.starts_with("target/") {
            made += 1;
            continue;
        }
        let directory = source.split('*').next().unwrap();
        assert!(root().join(directory).exists(), "{source} is not there");
    }
    assert!(made >= 5, "the program, its manual, and completions for three shells");
    let scripts = files(&root().join(package["maintainer-scripts"].as_str().unwrap()));
    assert_eq!(scripts.iter().map(|script| name(script)).collect::<Vec<_>>(), ["postinst", "postrm", "prerm"]);
    let texts: Vec<_> = scripts.iter().map(|script| fs::read_to_string(script).unwrap()).collect();
    for unit in files(&root().join("tools/package/systemd")) {
        for text in &texts {
            assert!(text.contains(name(&unit)), "a script does not know {}", unit.display());
        }
    }
}
