use super::*;

fn written() -> Vec<u8> {
    let tensor = |kind, shape: &[i64]| Pickled::Tensor { kind, shape: shape.into() };
    let tensors = [("a", tensor(Kind::BFloat16, &[3, 4])), ("b", tensor(Kind::Float, &[1 << 33]))];
    Pickled::dict(tensors).write().unwrap()
}

#[test]
fn what_is_written_is_read() {
    let read = state_dict(&written()).unwrap();
    let tensor = |storage: &str, kind, shape: &[i64], stride: &[i64]| TensorRef {
        storage: storage.into(),
        kind,
        storage_len: shape.iter().product(),
        offset: 0,
        shape: shape.into(),
        stride: stride.into(),
    };
    assert_eq!(read[0], ("a".into(), tensor("0", Kind::BFloat16, &[3, 4], &[4, 1])));
    assert_eq!(read[1], ("b".into(), tensor("1", Kind::Float, &[1 << 33], &[1])));
    assert_eq!(read.len(), 2);
    assert!(Pickled::Tensor { kind: Kind::Int64, shape: vec![1] }.write().is_err());
}

#[test]
fn code_is_refused_by_name_and_never_run() {
    let cases: [(&[u8], &str); 9] = [
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "it imports `os.system`"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "it imports `posix.system`"),
        (b"\x80\x02(ios\nsystem\n.", "it imports `os.system`"),
        (b"\x80\x02cbuiltins\neval\n.", "`builtins.eval`"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "`torch.storage._load_from_bytes`"),
        (b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n.", "_from_numpy`"),
        (b"\x80\x02co\x1bs\nsystem\n.", "`o\\u{1b}s.system`"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "instruction 0x81"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call does not make a tensor"),
    ];
    for (pickle, part) in cases {
        let e = state_dict(pickle).unwrap_err();
        assert!(e.contains(part), "{e}");
    }
}

#[test]
fn damage_is_told() {
    let good = written();
    for len in 0..good.len() {
        assert!(state_dict(&good[..len]).is_err(), "cut at {len}");
    }
    let cases: [(&[u8], &str); 10] = [
        (b"K\x01.", "holds the number 1"),
        (b"].", "holds a list"),
        (b"}X\x01\x00\x00\x00aK\x05s.", "`a` is the number 5, not a tensor"),
        (b"}K\x01K\x05s.", "a key of its dictionary is the number 1"),
        (b"}(K\x01u.", "a key without a value"),
        (b"(0.", "the stack is empty"),
        (b"t.", "there is no mark"),
        (b"h\x07.", "there is no memo 7 (byte 0 of data.pkl)"),
        (b"X\xff\xff\xff\xffa.", "ends in the middle"),
        (b"\x8b\x09\x00\x00\x00123456789.", "more than 64 bits"),
    ];
    for (pickle, part) in cases {
        let e = state_dict(pickle).unwrap_err();
        assert!(e.contains(part), "{e}");
    }
    // Deep nesting takes no stack.
    let mut deep = vec![b')'];
    deep.resize(1 << 20, 0x85);
    deep.push(b'.');
    assert!(state_dict(&deep).unwrap_err().contains("holds a tuple"));
}

#[test]
fn numbers_have_their_sign() {
    let number = |pickle: &[u8]| state_dict(pickle).unwrap_err();
    assert!(number(b"\x8a\x01\xff.").contains("number -1,"));
    assert!(number(b"\x8a\x02\xff\x00.").contains("number 255,"));
    assert!(number(b"\x8a\x00.").contains("number 0,"));
    assert!(number(b"J\xfe\xff\xff\xff.").contains("number -2,"));
    assert!(number(b"M\x01\x02.").contains("number 513,"));
}

/// Classes and functions that are foreign are data, and what is made of them has a name and a state; nothing is called.
#[test]
fn foreign_classes_are_kept_and_never_run() {
    let read = |pickle: &[u8], f: &dyn Fn(PickleNode)| f(Pickle::read(pickle, Foreign::Kept).unwrap().top());
    read(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", &|top| {
        assert_eq!(top.describe(), "an object of `os.system`");
        assert!(top.state().is_none() && !top.is_dict() && top.entries().next().is_none());
    });
    // argparse.Namespace(n=3, x=0.5, on=True, none=None, s={1}, big=2**70)
    let namespace = b"\x80\x04\x8c\x08argparse\x8c\x09Namespace\x93)\x81}(\x8c\x01nK\x03\x8c\x01xG\x3f\xe0\x00\x00\x00\x00\x00\x00\x8c\x02on\x88\x8c\x04noneN\x8c\x01s\x8f(K\x01\x90\x8c\x03big\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x40ub.";
    read(namespace, &|top| {
        assert_eq!(top.describe(), "an object of `argparse.Namespace`");
        let state = top.state().unwrap();
        let get = |key: &str| state.get(key).unwrap();
        assert_eq!(
            (get("n").integer(), get("x").number(), get("on").truth()),
            (Some(3), Some(0.5), Some(true))
        );
        assert!(get("none").is_none() && get("s").describe().contains("builtins.set"));
        assert_eq!((get("big").integer(), get("big").describe().as_str()), (None, "a number"));
        assert!(state.get("other").is_none());
    });
    for len in 0..namespace.len() {
        assert!(Pickle::read(&namespace[..len], Foreign::Kept).is_err(), "cut at {len}");
    }
    for (pickle, part) in
        [(&b"\x81."[..], "the stack is empty"), (b"\x90.", "there is no mark"), (b"]Nb.", "not a dictionary")]
    {
        let e = Pickle::read(pickle, Foreign::Kept).err().unwrap();
        assert!(e.contains(part), "{part}: {e}");
    }
}

/// What is written besides tensors comes back as it was said, names and objects of foreign classes too.
#[test]
fn values_of_all_kinds_come_back() {
    let size = Pickled::Call("torch", "Size", vec![Pickled::integers(&[64, 32])]);
    let state = Pickled::dict([
        ("none", Pickled::None),
        ("on", Pickled::Truth(true)),
        ("off", Pickled::Truth(false)),
        ("large", Pickled::Integer(-(1 << 40))),
        ("x", Pickled::Number(-0.1)),
        ("list", Pickled::List(vec![Pickled::text("a"), Pickled::Integer(7)])),
        ("dtype", Pickled::Name("torch", "bfloat16")),
        ("size", size),
        ("tensor", Pickled::Tensor { kind: Kind::Half, shape: vec![2, 3] }),
    ]);
    let pickle = Pickled::Object("argparse", "Namespace", Box::new(state)).write().unwrap();
    let read = Pickle::read(&pickle, Foreign::Kept).unwrap();
    assert_eq!(read.top().foreign_name(), Some(("argparse", "Namespace")));
    assert_eq!(read.top().args().count(), 0);
    let get = |key: &str| read.top().state().unwrap().get(key).unwrap();
    assert!(get("none").is_none());
    assert_eq!((get("on").truth(), get("off").truth()), (Some(true), Some(false)));
    assert_eq!((get("large").integer(), get("x").number()), (Some(-(1 << 40)), Some(-0.1)));
    let list: Vec<_> = get("list").items().collect();
    assert_eq!((list[0].text(), list[1].integer(), list.len()), (Some("a"), Some(7), 2));
    assert_eq!(get("dtype").foreign_name(), Some(("torch", "bfloat16")));
    assert_eq!(get("size").foreign_name(), Some(("torch", "Size")));
    let args: Vec<_> = get("size").args().collect();
    assert_eq!(args[0].items().map(PickleNode::integer).collect::<Vec<_>>(), [Some(64), Some(32)]);
    assert_eq!(get("tensor").tensor().unwrap().shape, [2, 3]);
    assert_eq!((get("x").items().count(), get("x").foreign_name()), (0, None));
}

/// What is not known stands for itself, and does not spoil what lies beside it: storages of newer types, objects of classes that are
/// themselves data.
#[test]
fn unknown_values_spoil_nothing() {
    for value in [
        &b"ctorch\nFloatStorage\n)\x81"[..],
        b"K\x01)\x81",
        b"(X\x07\0\0\0storagectorch\nUntypedStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ",
        b"ctorch._utils\n_rebuild_parameter\n(Nt R",
    ] {
        let value: Vec<u8> = value.iter().copied().filter(|byte| *byte != b' ').collect();
        let pickle = [&b"}(X\x01\0\0\0a"[..], &value, b"X\x01\0\0\0bK\x07u."].concat();
        let read = Pickle::read(&pickle, Foreign::Kept).unwrap();
        let get = |key: &str| read.top().get(key).unwrap();
        assert!(get("a").tensor().is_none() && get("a").describe().contains("not read here"));
        assert_eq!(get("b").integer(), Some(7));
        assert!(Pickle::read(&pickle, Foreign::Refused).is_err());
    }
}
