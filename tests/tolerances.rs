//! The table of tolerances: every row stays within its bound, and few bits have no less room than many.

use tch::Kind;
use testing::tolerance::Quantity::Gradient;
use testing::tolerance::{TABLE, allowed_beside};

/// No row may have a larger bound: what is further away has no digit that the dtype should give.
fn limit(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 2e-5, // where the reference has float32 only
        Kind::Float => 1e-3,
        _ => 0.25,
    }
}

#[test]
fn rows_stay_within_their_bounds() {
    for row in &TABLE {
        let what = format!("{:?} in {:?}", row.quantity, row.kind);
        assert!(0.0 < row.floor && row.floor <= row.bound, "{what}: floor {} above {}", row.floor, row.bound);
        assert!(row.bound <= limit(row.kind), "{what}: bound {} above {}", row.bound, limit(row.kind));
        assert!(row.slack <= row.floor && row.factor >= 0.0, "{what}");
        assert_eq!(
            row.factor > 0.0,
            row.bound > row.floor,
            "{what}: a bound above the floor is for a factor"
        );
        assert!(!row.reason.is_empty(), "{what} has no reason");
        let mut before = 0.0;
        for own in [0.0, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 1.0, f64::MAX] {
            let allowed = row.at(own);
            assert!(before <= allowed && allowed <= row.bound, "{what}: {allowed} where {own} is its own");
            before = allowed;
        }
        assert_eq!(row.at(0.0), row.floor, "{what}");
        assert_eq!((row.at(f64::NAN), row.at(f64::INFINITY)), (row.floor, row.floor), "{what}");
    }
}

#[test]
fn a_value_has_one_row_a_dtype_and_more_room_in_fewer_bits() {
    for (i, row) in TABLE.iter().enumerate() {
        for other in &TABLE[i + 1..] {
            if row.quantity == other.quantity {
                assert!(row.kind != other.kind, "{:?} in {:?} twice", row.quantity, row.kind);
                assert!(row.floor <= other.floor, "{:?}: {:?}, {:?}", row.quantity, row.kind, other.kind);
            }
        }
    }
}

#[test]
fn ill_conditioned_gradients_have_room_and_others_do_not() {
    // Own float32 errors of the golden models: about 1e-6, and up to 6.7e-6 for a bias of k.
    assert_eq!(allowed_beside(Gradient, Kind::BFloat16, 1e-6), 0.1);
    assert_eq!(allowed_beside(Gradient, Kind::BFloat16, 3e-6), 3e-6 * 65_536.0);
    assert_eq!(allowed_beside(Gradient, Kind::BFloat16, 6.7e-6), 0.25);
    assert_eq!(allowed_beside(Gradient, Kind::Float, 1e-6), 3e-6);
}
