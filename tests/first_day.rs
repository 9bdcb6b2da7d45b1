//! A new user's way: a configuration made for a model and data, runs without one, what was meant by a wrong command line, runs
//! read back.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs;

use serde_json::Value;
use testing::folder::folder;
use testing::program::{Program, corral, launch};
use testing::run::{Run, answers, data};

#[test]
fn a_configuration_is_made_that_runs() {
    let dir = folder("init");
    let (model, train) =
        (answers().display().to_string(), data().join("sft.train.jsonl").display().to_string());
    let valid = data().join("sft.valid.jsonl").display().to_string();
    let corral =
        |words: &[&str], name: &str| Program::corral(words).current_dir(&dir).run(&dir, name).expect_code(0);
    let made = corral(&["init", "sft", "--model", &model, "--data", &train, "--valid", &valid], "init");
    assert!(made.out.contains("corral sft --config sft.yaml"), "{made}");
    let text = fs::read_to_string(dir.join("sft.yaml")).unwrap();
    for part in
        ["# sft, written by corral init", "sequence_length: ", "all parameters are trained", "valid: ["]
    {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    corral(&["check", "sft", "--config", "sft.yaml"], "check");
    let ran = corral(&["sft", "--config", "sft.yaml", "train={steps: 3, batch_size: 4}"], "run");
    for part in ["3 steps in ", "try it:    corral chat --model runs/sft", "curves:    runs/sft/report.html"]
    {
        assert!(ran.err.contains(part), "{part} is missing: {ran}");
    }
    // A second one is not written over the first.
    let again = ["init", "sft", "--model", &model, "--data", &train];
    Program::corral(&again)
        .current_dir(&dir)
        .run(&dir, "again")
        .expect_error(2, &["sft.yaml exists already"]);
    let small = [
        "init",
        "sft",
        "--model",
        &model,
        "--data",
        &train,
        "--device-memory",
        "500MiB",
        "--output",
        "small.yaml",
    ];
    Program::corral(&small)
        .current_dir(&dir)
        .run(&dir, "small")
        .expect_error(2, &["it does not fit: the least is "]);
}

#[test]
fn a_run_needs_no_configuration() {
    let dir = folder("no-config");
    let (model, train) =
        (answers().display().to_string(), data().join("sft.train.jsonl").display().to_string());
    let words = ["sft", "--model", &model, "--data", &train, "train={steps: 2, batch_size: 4}"];
    let ran = Program::corral(&words).current_dir(&dir).run(&dir, "run").expect_code(0);
    assert!(ran.err.contains("# sft, written by corral init"), "{ran}");
    assert!(dir.join("runs/sft/model/config.json").is_file() && dir.join("runs/sft/report.html").is_file());
}

/// A few records that cannot be used stop nothing; a critic begins as a reward model with its adapter.
#[test]
fn a_configuration_is_made_for_data_and_models_as_they_are() {
    let dir = folder("init-odd");
    let corral =
        |words: &[&str], name: &str| Program::corral(words).current_dir(&dir).run(&dir, name).expect_code(0);
    let model = answers().display().to_string();
    let good = "{\"prompt\": \"1 + 1?\", \"completion\": \"2\"}\n".repeat(30);
    fs::write(dir.join("odd.jsonl"), format!("{good}{{\"prompt\": 1}}\n")).unwrap();
    let made = corral(&["init", "sft", "--model", &model, "--data", "odd.jsonl"], "odd");
    assert!(made.err.contains("(1 of 31 records); such records are left out"), "{made}");
    corral(&["sft", "--config", "sft.yaml", "train={steps: 1, batch_size: 4}"], "odd-run");
    // More than a tenth: the data are wrong.
    fs::write(dir.join("wrong.jsonl"), "{\"prompt\": 1}\n".repeat(20)).unwrap();
    let words = ["init", "sft", "--model", &model, "--data", "wrong.jsonl", "--output", "wrong.yaml"];
    Program::corral(&words).current_dir(&dir).run(&dir, "wrong").expect_error(3, &["20 of 20 records"]);

    let rankings = data().join("rankings.train.jsonl").display().to_string();
    corral(&["init", "reward", "--model", &model, "--data", &rankings], "reward");
    let few = ["reward", "--config", "reward.yaml", "lora={rank: 4}", "train={steps: 1, batch_size: 4}"];
    corral(&few, "reward-run");
    let prompts = data().join("prompts.train.jsonl").display().to_string();
    corral(&["init", "ppo", "--model", &model, "--reward-model", "runs/reward", "--data", &prompts], "ppo");
    let text = fs::read_to_string(dir.join("ppo.yaml")).unwrap();
    assert!(text.contains("critic: {lora: {\"rank\":4"), "{text}");
    let few =
        ["ppo", "--config", "ppo.yaml", "train={steps: 1, batch_size: 8}", "generation.max_new_tokens=8"];
    corral(&few, "ppo-run");
}

#[test]
fn ranks_need_no_configuration() {
    let dir = folder("no-config-ranks");
    let (model, train) =
        (answers().display().to_string(), data().join("sft.train.jsonl").display().to_string());
    let words =
        ["--nproc", "3", "sft", "--model", &model, "--data", &train, "train.epochs=null", "train.steps=2"];
    let ran = Program::new(launch()).args(&words).current_dir(&dir).run(&dir, "run").expect_code(0);
    // A batch of 16 does not divide into three shares.
    assert!(ran.err.contains("batch_size: 18"), "{ran}");
    assert!(dir.join("runs/sft/model/config.json").is_file());
}

#[test]
fn plans_predict_times_where_rates_are_known() {
    let dir = folder("predicted");
    let plan = |words: &[&str], name: &str| {
        let plan = ["plan", "pretrain", "--config", "llama-8b", "--json"];
        let home = dir.join("home").display().to_string();
        let program =
            Program::new(corral()).args(&plan).args(words).current_dir(&dir).env("CORRAL_HOME", &home);
        serde_json::from_str::<Value>(&program.run(&dir, name).expect_code(0).out).unwrap()
    };
    let [one, eight] = [("1", "one"), ("8", "eight")].map(|(ranks, name)| {
        plan(&["--gpu", "H100", "--nproc", ranks], name)["predicted_step_s"].as_f64().unwrap()
    });
    assert!((one / eight - 8.0).abs() < 1e-6, "{one} and {eight}");
    let both = ["plan", "pretrain", "--config", "llama-8b", "--gpu", "H100"];
    Program::corral(&both).run(&dir, "both").expect_error(2, &["leave out --device cpu"]);
    // An unknown GPU, and a processor that was not measured.
    assert!(plan(&["--gpu", "nothing"], "unknown")["predicted_s"].is_null());
    assert!(plan(&["--device", "cpu"], "cpu")["predicted_step_s"].is_null());
}

/// Typical mistakes, each with a part of the one line that answers it.
#[test]
fn mistakes_are_answered() {
    let dir = folder("mistakes");
    let cases: [(&[&str], &str); 26] = [
        (&["finetune"], "type corral sft"),
        (&["train"], "corral pretrain, corral sft"),
        (&["online_dpo"], "type corral online-dpo"),
        (&["evaluate"], "type corral eval"),
        (&["download", "x"], "type corral get"),
        (&["chat", "runs/a"], "corral chat --model runs/a"),
        (&["merge", "runs/a"], "corral merge --adapter runs/a"),
        (&["sft", "--optim.lr", "1e-4"], "type optim.lr=1e-4"),
        (&["sft", "--learning_rate", "1e-4"], "type optim.lr=1e-4"),
        (&["sft", "--learning-rate=1e-4"], "type optim.lr=1e-4"),
        (&["sft", "--lr", "1e-4"], "type optim.lr=1e-4"),
        (&["sft", "--nproc", "2"], "launch --nproc ... sft"),
        (&["sft", "my.yaml"], "--config my.yaml"),
        (&["sft", "--config", "nothere"], "the recipes of sft are default, "),
        (&["plan", "sft", "--device-memory", "24"], "24GiB"),
        (&["sft", "learning_rate=1e-4"], "here it is `optim.lr`"),
        (&["sft", "per_device_train_batch_size=1"], "here it is `train.micro_batch_size`"),
        (&["sft", "lora={r: 8}"], "here it is `lora.rank`"),
        (&["sft", "lora={rank: 8, base: 4bit}"], "here it is 'nf4'"),
        (&["sft", "lora={rank:8}"], "a space after a colon: `rank: 8`"),
        (&["sft", "--config", "tabs.yaml"], "spaces, not with tabs"),
        (&["sft", "precision.compute=bf16"], "here it is 'bfloat16'"),
        (&["sft", "parallel.mode=fsdp"], "here it is 'full'"),
        (&["ppo", "ppo.vf_coef=0.1"], "here it is `ppo.value_coef`"),
        (&["sft", "lr=1e-4"], "a key of another section: `optim.lr`"),
        (&["sft", "report_to=wandb"], "there is no such key: metrics.jsonl"),
    ];
    fs::write(dir.join("tabs.yaml"), "model:\n\tpath: x\n").unwrap();
    for (i, (words, part)) in cases.iter().enumerate() {
        let ended = Program::corral(words).current_dir(&dir).run(&dir, &format!("mistake-{i}"));
        ended.expect_error(2, &[part]);
    }
    // The trained model is `model` in every stage.
    let both = ["ppo", "model.path=a", "--config", "two.yaml"];
    fs::write(dir.join("two.yaml"), "model: {path: a}\nactor: {path: b}\noutput_dir: x\n").unwrap();
    Program::corral(&both).current_dir(&dir).run(&dir, "both").expect_error(2, &["'actor' is given too"]);
    // A key under another name is not missing, too.
    let err = Program::corral(&["sft", "lora={r: 8}"]).current_dir(&dir).run(&dir, "one").expect_code(2).err;
    assert!(!err.contains("is missing"), "{err}");
    // Standard input, and the names of torchrun.
    let model = format!("model.path={}", answers().display());
    let template = ["tokenizer={chat_template: llama3}", "data.train=[x.jsonl]", &model];
    Program::corral(&["sft"])
        .args(&template)
        .run(&dir, "template")
        .expect_error(2, &["did you mean `llama-3`?"]);
    let stdin = ["data.train.0=-", &model];
    Program::corral(&["sft"])
        .args(&stdin)
        .run(&dir, "stdin")
        .expect_error(3, &["standard input is not read"]);
    let torchrun = ["--nproc_per_node", "2", "sft", "lr=1"];
    let refused = Program::new(launch()).args(&torchrun).run(&dir, "torchrun").expect_code(2);
    assert!(refused.err.contains("`optim.lr`"), "{refused}");
    let coloured = |name: &str, no: &str| {
        let program = Program::corral(&["sft", "lr=1"]).env("CLICOLOR_FORCE", "1").env("NO_COLOR", no);
        program.run(&dir, name).expect_code(2).err.contains("\u{1b}[31merror:\u{1b}[0m ")
    };
    assert!(coloured("colour", "") && !coloured("no-colour", "1"));
    Program::corral(&["help", "lora_r"]).run(&dir, "help").expect_code(0);
}

#[test]
fn runs_are_read_back() {
    let run = Run::new("read-back");
    run.train(1, &[]);
    let dir = run.output().parent().unwrap().to_path_buf();
    let listed = Program::corral(&["runs", "--json"]).arg(&dir).run(&dir, "runs").expect_code(0);
    let line: Value = serde_json::from_str(listed.out.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&line["stage"], &line["state"], &line["step"]),
        (&"pretrain".into(), &"done".into(), &20.into())
    );
    let page = dir.join("page.html");
    let words = [
        "report".to_string(),
        run.output().display().to_string(),
        "--output".into(),
        page.display().to_string(),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Program::corral(&words).run(&dir, "report").expect_code(0);
    let text = fs::read_to_string(page).unwrap();
    assert!(text.contains("uPlot") && text.contains("\"valid\":{"), "the page");
    for line in run.metrics() {
        assert!(line["time"].as_str().is_some_and(|time| time.contains('T')), "{line}");
    }
    let epochs = run.numbers("train", "epoch");
    assert!(epochs.windows(2).all(|pair| pair[0] < pair[1]), "{epochs:?}");
    Program::corral(&["runs"])
        .arg(dir.join("checkpoints-none"))
        .run(&dir, "none")
        .expect_error(3, &["cannot read"]);
}

#[test]
fn recipes_are_listed_and_copied() {
    let dir = folder("recipes");
    let listed = Program::corral(&["recipes", "--json"]).run(&dir, "list").expect_code(0);
    let lines: Vec<Value> = listed.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 35, "{}", lines.len());
    let of = |name: &str| lines.iter().find(|line| line["recipe"] == name).unwrap();
    assert_eq!(of("sft/qwen2.5-7b-chats-qlora")["method"], "LoRA over nf4");
    // A published model has a plan without its files.
    assert!(of("sft/llama-3.1-8b-chats-qlora")["bytes"].as_i64().unwrap() > 4 << 30);
    let words = ["recipes", "sft/tiny", "--write", "mine.yaml"];
    Program::corral(&words).current_dir(&dir).run(&dir, "write").expect_code(0);
    assert_eq!(
        fs::read_to_string(dir.join("mine.yaml")).unwrap(),
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/sft/tiny.yaml")).unwrap()
    );
    Program::corral(&["recipes", "smollm2-hh"])
        .run(&dir, "several")
        .expect_error(2, &["several recipes: reward/"]);
}

#[test]
fn completions_and_man_pages_are_made() {
    let dir = folder("completions");
    for shell in ["bash", "zsh", "fish"] {
        let made = Program::corral(&["completions", shell]).run(&dir, shell).expect_code(0);
        assert!(made.out.contains("pretrain"), "{shell}");
    }
    Program::corral(&["help", "--man"]).arg(dir.join("man1")).run(&dir, "man").expect_code(0);
    assert!(dir.join("man1/corral-sft.1").is_file());
}
