use std::fs;

use testing::folder::{TestFolder, copy_files};
use testing::golden::golden_megatron;

use super::*;
use crate::checkpoint::Weights;

/// Every tensor of files that megatron-core wrote is that of the same model in Hugging Face's format, however ranks divide it.
#[test]
fn files_of_megatron_core_hold_the_model() {
    for model in ["llama", "tied", "bias"] {
        let dir = golden_megatron(model);
        let hf = Weights::open(&dir.join("hf")).unwrap();
        let mut folders = 0;
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if !path.file_name().unwrap().to_string_lossy().starts_with("torch-") {
                continue;
            }
            folders += 1;
            let megatron = Weights::open(&path).unwrap();
            let (ours, theirs) = (megatron.shape(), hf.shape());
            assert_eq!(ours, theirs, "{}", path.display());
            let layouts = crate::model::layout::layouts(ours);
            let (a, b) = (
                megatron.into_source().unwrap(),
                Weights::open(&dir.join("hf")).unwrap().into_source().unwrap(),
            );
            for spec in layouts.iter().flat_map(|l| &l.specs) {
                let tensor = |source: &TensorSource| source.tensor(&spec.name).unwrap();
                assert!(tensor(&a).equal(&tensor(&b)), "{}: {}", path.display(), spec.name);
            }
        }
        assert!(folders > 0, "{model}: no folder");
    }
}

#[test]
fn what_cannot_be_read_is_told() {
    let good = golden_megatron("llama").join("torch-tp2-pp1");
    let refused = |dir: &TestFolder, part: &str| {
        let e = MegatronModel::load(&dir.0).err().unwrap();
        assert!(e.message.contains(part), "{part}: {e}");
    };
    let copy = |name: &str| {
        let folder = TestFolder::new(&format!("megatron-{name}"));
        copy_files(&good, &folder.0, |_| false);
        for rank in ["mp_rank_00", "mp_rank_01"] {
            let to = folder.0.join("iter_0000001").join(rank);
            fs::create_dir_all(&to).unwrap();
            copy_files(&good.join("iter_0000001").join(rank), &to, |_| false);
        }
        folder
    };
    let whole = copy("whole");
    assert!(MegatronModel::load(&whole.0).is_ok());
    assert!(MegatronModel::load(&whole.0.join("iter_0000001")).is_ok(), "the iteration itself");
    let dir = copy("missing");
    fs::remove_dir_all(dir.0.join("iter_0000001/mp_rank_01")).unwrap();
    refused(&dir, "mp_rank_01");
    let dir = copy("tracker");
    fs::write(dir.0.join(TRACKER), "7").unwrap();
    refused(&dir, "iter_0000007, which is not there");
    fs::write(dir.0.join(TRACKER), "newest").unwrap();
    refused(&dir, "must be a number or the word release");
    fs::write(dir.0.join(TRACKER), "release\n").unwrap();
    fs::rename(dir.0.join("iter_0000001"), dir.0.join("release")).unwrap();
    assert!(MegatronModel::load(&dir.0).is_ok());
    fs::write(dir.0.join("release/.metadata"), "").unwrap();
    refused(&dir, "torch_dist is not read");
}
