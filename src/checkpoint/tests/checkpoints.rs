//! Checkpoints of a training that are saved, damaged and loaded.

use super::*;
use crate::checkpoint::sharded::{TensorPiece, list, pieces};
use crate::distributed::sharded::Slice;
use crate::error::Result;

#[test]
fn pieces_cover_a_range_exactly() {
    // Every way to cut 23 elements into slices of `size`, every range.
    for size in 1..=24 {
        let slices: Vec<Slice> = (0..24)
            .map(|r| (r * size).min(23))
            .map(|start| Slice { start, len: size.min(23 - start) })
            .collect();
        for first in 0..23 {
            for len in 0..=23 - first {
                let found = pieces(slices.iter().copied(), first, len);
                let elements: Vec<(i64, i64)> = found
                    .iter()
                    .flat_map(|p| (0..p.len).map(|k| (p.to + k, slices[p.rank].start + p.from + k)))
                    .collect();
                let right: Vec<(i64, i64)> = (0..len).map(|k| (k, first + k)).collect();
                assert_eq!(elements, right, "slices of {size}, {first} + {len}");
            }
        }
    }
    let two = [Slice { start: 0, len: 5 }, Slice { start: 5, len: 2 }];
    let right =
        [TensorPiece { rank: 0, from: 3, to: 0, len: 2 }, TensorPiece { rank: 1, from: 0, to: 2, len: 1 }];
    assert_eq!(pieces(two.into_iter(), 3, 3), right);
}

#[test]
fn checkpoints_load_at_every_world_size() {
    let cases = [
        (1, StorageMode::Full, Kind::Float, true),
        (2, StorageMode::Full, Kind::BFloat16, false),
        (3, StorageMode::Full, Kind::Double, true),
        (2, StorageMode::Replicate, Kind::Float, false),
    ];
    for (n, mode, compute, tied) in cases {
        let (folder, shape) = (TestFolder::new("checkpoint"), tiny(tied));
        save(&folder.0, &shape, n, mode, compute, &[3, 10]);
        let checkpoint = latest(&folder.0).unwrap().unwrap();
        assert_eq!(checkpoint.dir(), step_dir(&folder.0, 10));
        assert_eq!(checkpoint.meta().world_size, n);
        assert_eq!(checkpoint.meta().slices.len() as i64, if mode == StorageMode::Full { n } else { 1 });
        for (ranks, mode) in [
            (1, StorageMode::Full),
            (2, StorageMode::Full),
            (2, StorageMode::Replicate),
            (5, StorageMode::Full),
        ] {
            on_ranks(ranks, |world| {
                let mut params = params(&shape, &world, mode, compute);
                let mut optim = optimizer(&params);
                let state = checkpoint.load(&mut params, &mut optim).unwrap();
                assert_eq!(state, TrainerState { step: 10, state: json!({"tokens": 7, "x": 0.1}) });
                assert_trained(&params, &optim, &shape, &world, mode, compute);
            });
        }
        // The newest, the run's folder and the checkpoint itself are models to start from.
        for path in [folder.0.clone(), step_dir(&folder.0, 3)] {
            let weights = Weights::open(&path).unwrap();
            assert_eq!(weights.shape(), &shape);
            assert!(weights.tokenizer_dir().unwrap().is_some());
            let mut params = params(&shape, &Group::solo(), StorageMode::Full, compute);
            weights.fill(&mut params).unwrap();
            assert!(
                params
                    .master(0)
                    .equal(&trained(&shape, &Group::solo(), StorageMode::Full, compute).0.master(0))
            );
        }
    }
}

#[test]
fn a_checkpoint_takes_the_space_that_was_estimated() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(false));
    save(&folder.0, &shape, 2, StorageMode::Full, Kind::Float, &[1]);
    let shards: u64 = latest(&folder.0).unwrap().unwrap().meta().files[..2].iter().map(|f| f.bytes).sum();
    let estimate = bytes_per_checkpoint(&layouts(&shape), Kind::Float, MomentsIn::Float32);
    assert_eq!(estimate, shape.num_parameters() as u64 * 12);
    assert!(estimate <= shards && shards < estimate + 8000, "{estimate} {shards}");

    let folder = TestFolder::new("checkpoint");
    save(&folder.0, &shape, 2, StorageMode::Full, Kind::BFloat16, &[1]);
    let shards: u64 = latest(&folder.0).unwrap().unwrap().meta().files[..2].iter().map(|f| f.bytes).sum();
    let estimate = bytes_per_checkpoint(&layouts(&shape), Kind::Float, MomentsIn::EightBit);
    assert!(estimate < shape.num_parameters() as u64 * 61 / 10, "6 bytes and 8 for each 256");
    assert!(estimate <= shards && shards < estimate + 12000, "{estimate} {shards}");
}

#[test]
fn old_checkpoints_go_and_leftovers_of_killed_runs_too() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(true));
    let dir = folder.0.join("checkpoints");
    let steps = || list(&dir).unwrap().into_iter().map(|(s, _)| s).collect::<Vec<_>>();
    save(&folder.0, &shape, 1, StorageMode::Full, Kind::Float, &[10, 20, 30, 40]);
    assert_eq!(steps(), [30, 40]);
    // Killed while saving, while removing, and while replacing a checkpoint.
    fs::create_dir(dir.join(".tmp-step-00000050")).unwrap();
    fs::write(dir.join(".tmp-step-00000050/shard"), "x").unwrap();
    fs::create_dir(dir.join(".trash-step-00000020")).unwrap();
    fs::rename(dir.join("step-00000040"), dir.join(".old-step-00000040")).unwrap();
    Saver::new(&folder.0, 2, run_info(), &Group::solo()).unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    assert_eq!(steps(), [30, 40]);
    assert_eq!(latest(&folder.0).unwrap().unwrap().meta().step, 40);
    // The same step once more; then a history that begins anew at an older step.
    save(&folder.0, &shape, 1, StorageMode::Full, Kind::Float, &[40]);
    assert_eq!(steps(), [30, 40]);
    save(&folder.0, &shape, 1, StorageMode::Full, Kind::Float, &[35]);
    assert_eq!(steps(), [30, 35]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_never_passed_over() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(true));
    let fresh = || {
        let _ = fs::remove_dir_all(folder.0.join("checkpoints"));
        save(&folder.0, &shape, 1, StorageMode::Full, Kind::Float, &[1, 2]);
        step_dir(&folder.0, 2)
    };
    let advice = format!("--resume {}", step_dir(&folder.0, 1).display());
    let expect = |e: Error, file: &str| {
        assert_eq!(e.exit_code(), 3, "{e}");
        assert!(e.message.contains(file) && e.message.contains(&advice), "{e}");
    };
    let shard = "shard-00000-of-00001.safetensors";

    let dir = fresh();
    let bytes = fs::metadata(dir.join(shard)).unwrap().len();
    flip(&dir.join(shard), bytes - 1000);
    expect(load_error(&latest(&folder.0).unwrap().unwrap(), &shape), shard);

    OpenOptions::new().write(true).open(dir.join(shard)).unwrap().set_len(bytes - 1).unwrap();
    expect(latest(&folder.0).unwrap_err(), shard);
    fs::remove_file(dir.join(shard)).unwrap();
    expect(latest(&folder.0).unwrap_err(), shard);

    let dir = fresh();
    let text = fs::read_to_string(dir.join("meta.json")).unwrap();
    fs::write(dir.join("meta.json"), text.replace("\"tokens\": 7", "\"tokens\": 8")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");
    fs::write(dir.join("meta.json"), text.replace("\"version\": 1", "\"version\": 9")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "version 9");
    fs::write(dir.join("meta.json"), &text[..text.len() / 2]).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");
    fs::remove_file(dir.join("meta.json")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");

    fresh();
    let other = Shape { hidden_size: 32, ..shape.clone() };
    let e = load_error(&latest(&folder.0).unwrap().unwrap(), &other);
    assert!(
        e.message
            .contains("`model.embed_tokens.weight` is [37, 24] in the checkpoint, [37, 32] in the model")
    );
    fs::remove_dir_all(step_dir(&folder.0, 1)).unwrap();
    fs::remove_file(step_dir(&folder.0, 2).join("meta.json")).unwrap();
    assert!(latest(&folder.0).unwrap_err().message.contains("no older checkpoint is complete"));
    assert!(latest(&folder.0.join("nothing")).unwrap().is_none());
}

#[test]
fn damage_that_one_rank_sees_stops_all_ranks() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(false));
    save(&folder.0, &shape, 2, StorageMode::Full, Kind::Float, &[1]);
    let shard = "shard-00001-of-00002.safetensors";
    let path = step_dir(&folder.0, 1).join(shard);
    flip(&path, fs::metadata(&path).unwrap().len() - 1);
    let errors = on_ranks(2, |world| {
        let checkpoint = latest(&folder.0).unwrap().unwrap();
        let mut params = params(&shape, &world, StorageMode::Full, Kind::Float);
        let mut optim = optimizer(&params);
        checkpoint.load(&mut params, &mut optim).unwrap_err()
    });
    for e in errors {
        assert!(e.exit_code() == 3 && e.message.contains(shard), "{e}");
    }
}

#[test]
fn a_failed_save_leaves_nothing_and_is_known_to_all_ranks() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(false));
    let dir = folder.0.join("checkpoints");
    let results: Vec<(Error, Result<Option<Saved>>)> = on_ranks(2, |world| {
        let (params, optim) = trained(&shape, &world, StorageMode::Full, Kind::Float);
        let mut saver = Saver::new(&folder.0, 3, run_info(), &world).unwrap();
        // The disk is full for rank 1 alone.
        if world.rank() == 1 {
            let temp = dir.join(".tmp-step-00000007");
            fs::create_dir_all(&temp).unwrap();
            let shard = temp.join(".tmp-shard-00001-of-00002.safetensors");
            std::os::unix::fs::symlink("/dev/full", shard).unwrap();
        }
        world.barrier().unwrap();
        saver.begin(7, &only(&shape, &params, &optim), json!(null)).unwrap();
        while saver.failed_saves() == 0 {
            assert!(saver.poll().unwrap().is_none());
        }
        assert_eq!(saver.failed_saves(), 1);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        world.barrier().unwrap();
        if world.rank() == 1 {
            let temp = dir.join(".tmp-step-00000008");
            fs::create_dir_all(&temp).unwrap();
            let shard = temp.join(".tmp-shard-00001-of-00002.safetensors");
            std::os::unix::fs::symlink("/dev/full", shard).unwrap();
        }
        world.barrier().unwrap();
        saver.begin(8, &only(&shape, &params, &optim), json!(null)).unwrap();
        let last = saver.finish().unwrap_err();
        saver.begin(9, &only(&shape, &params, &optim), json!(null)).unwrap();
        (last, saver.finish())
    });
    for (error, after) in results {
        assert_eq!(error.exit_code(), 1);
        assert!(
            error.message.contains("step 8") && error.message.contains("shard-00001-of-00002"),
            "{error}"
        );
        assert_eq!(after.unwrap().unwrap().step, 9);
    }
    assert_eq!(latest(&folder.0).unwrap().unwrap().meta().step, 9);
}

#[test]
fn further_models_lie_in_folders_of_their_own() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(false));
    let other = Shape { hidden_size: 2 * shape.hidden_size, ..shape.clone() };
    on_ranks(2, |world| {
        let (params, optim) = trained(&shape, &world, StorageMode::Full, Kind::Float);
        let (critic, of_critic) = trained(&other, &world, StorageMode::Full, Kind::Float);
        let mut saver = Saver::new(&folder.0, 3, run_info(), &world).unwrap();
        let part =
            |name, shape, params, optim| SavedPart { name, shape, base: None, scoring: None, params, optim };
        let models = [
            part("", &shape, &params, Some(&optim)),
            part("critic", &other, &critic, Some(&of_critic)),
            part("ema", &shape, &params, None),
        ];
        saver.begin(4, &models, json!({"tokens": 7})).unwrap();
        saver.finish().unwrap().unwrap();
    });
    let checkpoint = latest(&folder.0).unwrap().unwrap();
    for (name, shape, moments) in [("critic", &other, true), ("ema", &shape, false)] {
        let part = checkpoint.part(name).unwrap();
        let world = Group::solo();
        let (expected, of_expected) = trained(shape, &world, StorageMode::Full, Kind::Float);
        let mut params = Sharded::new(layouts(shape), Sharding::solo(), Kind::Float, Device::Cpu);
        let mut optim = AdamW::new(&params, of_expected.hyper);
        match moments {
            true => drop(part.load(&mut params, &mut optim).unwrap()),
            false => drop(part.fill_weights(&mut params).unwrap()),
        }
        for i in 0..params.len() {
            assert!(params.master(i).equal(&expected.master(i)), "{name}");
            let pairs = optim.moments[i].tensors().into_iter().zip(of_expected.moments[i].tensors());
            assert!(!moments || pairs.into_iter().all(|((_, a), (_, b))| a.equal(b)), "{name}");
        }
        assert_eq!(optim.step, if moments { of_expected.step } else { 0 });
    }
    assert!(checkpoint.part("actor").unwrap_err().message.contains("has no actor"));

    // What a part lacks, the whole lacks.
    let shard = checkpoint.dir().join("critic/shard-00001-of-00002.safetensors");
    fs::remove_file(&shard).unwrap();
    let e = latest(&folder.0).unwrap_err();
    assert!(e.exit_code() == 3 && e.message.contains("critic/shard-00001"), "{e}");
}
