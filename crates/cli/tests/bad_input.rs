//! Bad input: what is said, where, with which exit code, and that nothing is left.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use common::{model, run, sllm};

#[test]
fn a_missing_path_is_3() {
    let fixture = model();
    let (missing, target) = (fixture.path("missing"), fixture.path("target"));
    for (word, ran) in [
        ("convert", run("convert", &[&missing, &target], &[])),
        ("export", run("export", &[&missing, &target], &[])),
        ("inspect", run("inspect", &[&missing], &[])),
        ("verify", run("verify", &[&missing], &[])),
        ("load", run("load", &[&missing], &[])),
    ] {
        assert_eq!((ran.code, ran.stdout.as_str()), (3, ""), "{word}");
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains("missing"), "{word}: {}", ran.stderr);
        assert!(!target.exists());
    }
}

#[test]
fn a_tensor_that_is_not_there_is_3() {
    let fixture = model();
    let ran = run("inspect", &[&fixture.model], &["--tensors", "lm_head.*"]);
    assert_eq!(ran.code, 3);
    assert!(ran.stderr.contains("lm_head.*"), "{}", ran.stderr);
}

#[test]
fn a_truncated_file_is_4_and_leaves_nothing() {
    let fixture = model();
    let path = fixture.model.join("model.safetensors");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let ran = run("convert", &[&fixture.model, &fixture.path("store")], &["--json"]);
    assert_eq!(ran.code, 4);
    let error = &ran.json()["error"];
    assert_eq!(error["kind"], "format");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("model.safetensors"), "{message}");
    assert!(ran.stderr.starts_with("error: invalid checkpoint: "), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("model.safetensors").count(), 1, "{}", ran.stderr);
    let left: Vec<_> = fs::read_dir(fixture.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["model"]);
}

#[test]
fn a_target_that_exists_is_7() {
    let fixture = model();
    let (store, target) = (fixture.store(), fixture.path("target"));
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious"), "data").unwrap();
    for ran in [run("convert", &[&fixture.model, &target], &[]), run("export", &[&store, &target], &[])] {
        assert_eq!(ran.code, 7);
        assert!(ran.stderr.contains("exists already: choose another path"), "{}", ran.stderr);
    }
    // What is no store is not replaced on request either.
    assert_eq!(run("convert", &[&fixture.model, &target], &["--overwrite"]).code, 2);
    assert_eq!(fs::read(target.join("precious")).unwrap(), b"data");
}

#[test]
fn a_flipped_bit_is_1_and_names_chunk_offset_and_tensors() {
    let fixture = model();
    let store = fixture.store();
    let file = fs::OpenOptions::new().read(true).write(true).open(store.join("tensor.data_0")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 5000).unwrap();

    for options in [&[][..], &["--quiet"][..]] {
        let ran = run("verify", &[&store], options);
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains("1 of 1 chunk is corrupt"), "{}", ran.stderr);
        if options.is_empty() {
            assert!(ran.stdout.contains("tensor.data_0: chunk 0 (offset 0, "), "{}", ran.stdout);
            for tensor in ["embed.weight", "norm.weight", "norm.bias"] {
                assert!(ran.stdout.contains(&format!("  tensor {tensor:?}\n")), "{}", ran.stdout);
            }
        }
    }
    let ran = run("load", &[&store], &["--device", "host", "--verify", "--quiet"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
    assert!(ran.stderr.contains("tensor.data_0: chunk 0") && ran.stderr.contains("norm.weight"), "{}", ran.stderr);
    let ran = run("verify", &[&store], &["--json"]);
    assert_eq!(ran.code, 1);
    let json = ran.json();
    assert_eq!(json["error"]["kind"], "corrupt");
    let chunk = &json["corrupt"][0];
    assert_eq!((&chunk["chunk"], &chunk["offset"]), (&0.into(), &0.into()));
    assert!(chunk["tensors"].as_array().unwrap().contains(&"embed.weight".into()));
}

#[test]
fn of_a_corrupt_chunk_of_many_tensors_few_are_named() {
    let fixture = model();
    let entry = |i: usize| format!(r#""t{i:02}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1);
    let header = format!("{{{}}}", (0..18).map(entry).collect::<Vec<_>>().join(","));
    fs::write(fixture.model.join("model.safetensors"), test_support::safetensors(header, &[7; 18])).unwrap();
    let store = fixture.store();
    fs::OpenOptions::new().write(true).open(store.join("tensor.data_0")).unwrap().write_all_at(&[8], 0).unwrap();
    let ran = run("verify", &[&store], &[]);
    assert_eq!(ran.code, 1);
    assert!(ran.stdout.ends_with("  tensor \"t14\"\n  tensor \"t15\"\n  and 2 more tensors\n"), "{}", ran.stdout);
    let json = run("verify", &[&store], &["--json"]).json();
    let chunk = &json["corrupt"][0];
    assert_eq!((chunk["tensors"].as_array().unwrap().len(), &chunk["more_tensors"]), (16, &2.into()));
}

#[test]
fn only_a_store_is_verified() {
    let fixture = model();
    let ran = run("verify", &[&fixture.model], &["--json"]);
    assert_eq!(ran.code, 2);
    assert_eq!(ran.json()["error"]["kind"], "invalid");
}

#[test]
fn a_wrong_argument_is_2() {
    let fixture = model();
    for (word, options) in [
        ("inspect", &["--no-such-option"][..]),
        ("inspect", &["second"][..]),
        ("verify", &["--threads", "many"][..]),
        ("load", &["--engine", "fast"][..]),
        ("load", &["--direct", "maybe"][..]),
        ("load", &["--engine", "mapped", "--direct", "on"][..]),
        ("load", &["--pinned", "32M"][..]),
        ("load", &["--pinned", "99999999TiB"][..]),
        ("load", &["--pinned", "1"][..]),
        ("load", &["--repeat", "0"][..]),
        ("load", &["--device", "tpu"][..]),
        ("no-such-command", &[][..]),
        ("completions", &[][..]),
    ] {
        let ran = run(word, &[&fixture.model], options);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{word} {options:?}");
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
    }
    assert_eq!(sllm([""; 0]).output().unwrap().status.code(), Some(2));
    let ran = run("inspect", &[&fixture.model], &["--json", "--no-such-option"]);
    assert_eq!(ran.json()["error"]["kind"], "invalid");
}

#[test]
fn a_usage_error_in_json_says_what_the_text_says() {
    let message = |word: &str, options: &[&str]| {
        let ran = run(word, &[], &[options, &["--json"]].concat());
        assert_eq!(ran.code, 2);
        ran.json()["error"]["message"].as_str().unwrap().to_owned()
    };
    assert!(message("convert", &[]).ends_with("<SOURCE> <TARGET>"));
    assert!(message("load", &["m", "--engine", "fast"]).contains("auto, uring, pread, mapped"));
    assert!(message("load", &["m", "--engin", "auto"]).contains("'--engine'"));
}

#[test]
fn paths_that_are_not_utf8_have_a_form_in_json() {
    let fixture = model();
    let named = |name: &[u8]| fixture.dir.path().join(OsStr::from_bytes(name));
    let (source, store, back) = (named(b"m\xff"), named(b"s\xff"), named(b"b\xff"));
    fs::rename(&fixture.model, &source).unwrap();
    fs::write(source.join(OsStr::from_bytes(b"left\xff.bin")), "").unwrap();
    for (word, paths) in [
        ("convert", &[&*source, &*store][..]),
        ("inspect", &[&*store][..]),
        ("verify", &[&*store][..]),
        ("load", &[&*store][..]),
        ("prefetch", &[&*store][..]),
        ("export", &[&*store, &*back][..]),
    ] {
        let ran = run(word, paths, &["--json"]);
        assert_eq!(ran.code, 0, "{word}: {}", ran.stderr);
        let told = ran.json();
        let path = if word == "load" { &told["runs"][0]["path"] } else { &told["path"] };
        assert!(path.as_str().unwrap().ends_with('\u{fffd}'), "{word}: {told}");
        assert!(word != "convert" || told["skipped"] == serde_json::json!(["left\u{fffd}.bin"]), "{told}");
    }
    let mut data = fs::OpenOptions::new().write(true).open(store.join("tensor.data_0")).unwrap();
    data.write_all(b"changed").unwrap();
    let ran = run("verify", &[&store], &["--json"]);
    assert_eq!((ran.code, ran.json()["corrupt"].as_array().unwrap().len()), (1, 1));
}

#[test]
fn a_weight_file_whose_name_is_not_utf8_is_refused_and_not_left_out() {
    let fixture = model();
    let shard = |name: &[u8]| fixture.model.join(OsStr::from_bytes(name));
    fs::rename(shard(b"model.safetensors"), shard(b"model-1.safetensors")).unwrap();
    assert_eq!(run("inspect", &[&fixture.model], &[]).code, 0);
    fs::write(shard(b"model-2\xff.safetensors"), "").unwrap();
    let ran = run("inspect", &[&fixture.model], &[]);
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("model-2\u{fffd}.safetensors: the name of a weight file must be UTF-8"),
        "{}",
        ran.stderr
    );
}

#[test]
fn names_of_files_do_not_command_a_terminal() {
    let fixture = model();
    fs::write(fixture.model.join("x\u{1b}[31m.bin"), "").unwrap();
    let ran = run("convert", &[&fixture.model, &fixture.path("st\u{1b}ore")], &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(
        ran.stdout.contains("not copied: x\\u{1b}[31m.bin\n") && !ran.stdout.contains('\u{1b}'),
        "{:?}",
        ran.stdout
    );
    for word in ["inspect", "verify", "prefetch", "load"] {
        assert!(!run(word, &[&fixture.path("st\u{1b}ore")], &[]).stdout.contains('\u{1b}'), "{word}");
    }
    fs::write(fixture.path("bad\u{1b}.safetensors"), "").unwrap();
    let ran = run("inspect", &[&fixture.path("bad\u{1b}.safetensors")], &[]);
    assert!(ran.stderr.contains("bad\\u{1b}.safetensors") && ran.stderr.ends_with('\n'), "{:?}", ran.stderr);
    assert!(!ran.stderr.contains('\u{1b}'), "{:?}", ran.stderr);
}

#[test]
fn too_many_threads_are_2_and_the_same_words_everywhere() {
    let fixture = model();
    let (store, target) = (fixture.store(), fixture.path("target"));
    for threads in ["0", "257", "18446744073709551615"] {
        let mut said: Vec<String> = Vec::new();
        for (word, paths) in [
            ("convert", &[&*fixture.model, &*target][..]),
            ("export", &[&*store, &*target][..]),
            ("verify", &[&*store][..]),
            ("load", &[&*store, "--device=host".as_ref()][..]),
        ] {
            let ran = run(word, paths, &["--threads", threads]);
            assert_eq!(ran.code, 2, "{word}: {}", ran.stderr);
            said.push(ran.stderr.lines().last().unwrap().to_owned());
            assert!(!target.exists());
        }
        assert!(said[0].contains("1 to 256") && said.iter().all(|one| *one == said[0]), "{said:?}");
        let left = fs::read_dir(fixture.dir.path()).unwrap().count();
        assert_eq!(left, 2, "something besides the model and its store is left");
    }
    assert_eq!(run("verify", &[&store], &["--threads", "256"]).code, 0);
}

#[test]
fn a_device_that_is_not_there_is_9() {
    let fixture = model();
    let ran = run("load", &[&fixture.model], &["--device", "cuda:63", "--json"]);
    assert_eq!(ran.code, 9);
    assert_eq!(ran.json()["error"]["kind"], "device");
}

#[test]
fn a_bad_glob_is_2() {
    let fixture = model();
    assert_eq!(run("inspect", &[&fixture.model], &["--tensors", "[a"]).code, 2);
}

#[test]
fn a_revision_goes_with_a_repository_only() {
    let fixture = model();
    let ran = run("inspect", &[&fixture.model], &["--revision", "v2"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("--revision"), "{}", ran.stderr);
    assert_eq!(run("inspect", &["org/name".as_ref()], &["--revision", "v2"]).code, 3);
}

#[test]
fn a_revision_is_looked_up_in_the_cache() {
    let fixture = model();
    let repo = fixture.path("cache/models--org--name");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
    fs::write(repo.join("refs/v2"), "abc").unwrap();
    fs::copy(fixture.model.join("model.safetensors"), repo.join("snapshots/abc/model.safetensors")).unwrap();
    let inspect = |options: &[&str]| {
        let mut command = sllm(["inspect", "org/name", "--json"]);
        command.args(options).env("HF_HUB_CACHE", fixture.path("cache")).output().unwrap()
    };
    assert_eq!(inspect(&["--revision", "v2"]).status.code(), Some(0));
    assert_eq!(inspect(&["--revision", "v3"]).status.code(), Some(3));
    assert_eq!(inspect(&[]).status.code(), Some(3));
}

#[test]
fn a_full_standard_output_is_8() {
    let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let fixture = model();
    let inspect = ["inspect", fixture.model.to_str().unwrap()];
    for args in [&inspect[..], &["--help"], &["load", "--help"], &["--version"], &["completions", "bash"]] {
        let mut command = Command::new(sllm([""; 0]).get_program());
        let output = command.args(args).stdout(full.try_clone().unwrap()).output().unwrap();
        assert_eq!(output.status.code(), Some(8), "{args:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("cannot write to standard output\n  caused by: "), "{args:?}: {stderr}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let fixture = model();
    let inspect = ["inspect", fixture.model.to_str().unwrap()];
    for args in [&inspect[..], &["--help"], &["completions", "zsh"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(sllm([""; 0]).get_program()).args(args).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{args:?}");
    }
}

#[test]
fn ctrl_c_stops_a_conversion_with_130_and_makes_no_store() {
    let fixture = model();
    // A tensor of many chunks, without disk blocks.
    let source = fixture.path("large.safetensors");
    let len = 512u64 << 20;
    let head = test_support::safetensors(test_support::header(len), &[]);
    fs::write(&source, &head).unwrap();
    fs::OpenOptions::new().write(true).open(&source).unwrap().set_len(head.len() as u64 + len).unwrap();

    let target = fixture.path("store");
    let mut child = Command::new(sllm([""; 0]).get_program())
        .arg("convert")
        .args([&source, &target])
        .args(["--threads", "1", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = stderr.next().unwrap().unwrap();
    assert!(first.starts_with("convert: 10%"), "{first}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let rest: Vec<String> = stderr.map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.status.signal()), (Some(130), None), "{rest:?}");
    let [.., error, note] = rest.as_slice() else { panic!("{rest:?}") };
    assert_eq!(error, "error: cancelled");
    let partial = fixture.path(".store.sllm-partial");
    assert!(
        note.contains(&format!("{}: run this again to go on with the same source, or remove it", partial.display())),
        "{note}"
    );
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["error"]["kind"], "cancelled");
    assert_eq!(json["error"]["message"], format!("cancelled; {note}"));
    assert!(!target.exists() && partial.is_dir());
}
