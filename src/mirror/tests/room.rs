//! A bounded cache in which nothing makes room, and one whose bound is changed.

use super::*;
use crate::mirror::ResizeError;
use crate::mirror::policy::{Admission, Kind};
use crate::units::MIB;

#[test]
fn nobody_waits_for_room_and_what_found_none_is_not_kept() {
    on_both(|| async {
        let contents = solid(6 << 20);
        let root = tempfile::tempdir().unwrap();
        let settings =
            SpaceSettings { limit: Some(4 * MIB), reserve: 0, policy: Kind::Lru, admission: Admission::Always };
        // Nobody runs its evictor.
        let space = Space::new(root.path(), settings);
        let cache = Cache::open(root.path(), "image").unwrap();
        let lower = recorded(&contents);
        let mirror = Mirror::open("image", cache, lower.clone(), None, &space, &Settings::default()).unwrap();
        for start in (0..3 * MIB).step_by(to_usize(MIB)) {
            read(&mirror, start, start + MIB).await.unwrap();
        }
        mirror.0.stored().await;
        assert_eq!(space.stats().bypassed_chunks.value(), 0);
        // It has been answered, and room is still hoped for.
        assert!(read(&mirror, 5 * MIB, 6 * MIB).await.unwrap() == contents[5 << 20..]);
        assert_eq!(space.stats().bypassed_chunks.value(), 0);
        // Who comes meanwhile is answered by the same fetch.
        lower.take_reads();
        assert!(read(&mirror, 5 * MIB, 6 * MIB).await.unwrap() == contents[5 << 20..]);
        assert_eq!(lower.take_reads(), []);
        mirror.0.stored().await;
        assert_eq!(space.stats().bypassed_chunks.value(), MIB / mirror.chunk_size());
        assert!(space.usage().used <= 4 * MIB);
        assert_eq!(space.usage().in_flight, 0);
    });
}

#[test]
fn a_limit_that_is_changed_holds_from_then_on_and_one_that_cannot_is_refused() {
    on_both(|| async {
        let contents = solid(6 << 20);
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), SpaceSettings::default());
        let cache = Cache::open(root.path(), "image").unwrap();
        let mirror = Mirror::open("image", cache, recorded(&contents), None, &space, &Settings::default()).unwrap();
        for start in (0..6 * MIB).step_by(to_usize(MIB)) {
            read(&mirror, start, start + MIB).await.unwrap();
        }
        mirror.0.stored().await;
        assert!(space.usage().used > 6 * MIB);
        mirror.pin(&[ByteRange::between(0, 2 * MIB)]).await.unwrap();
        let before = space.settings();
        let Err(ResizeError::TooSmall { limit, kept }) = space.resize(Some(2 * MIB), 4096) else { panic!("it fits?") };
        assert!(limit == 2 * MIB && kept > limit && space.settings() == before);
        space.resize(Some(4 * MIB), 0).unwrap();
        // By whoever runs the evictor.
        space.make_room().await;
        assert!(space.usage().used <= 4 * MIB);
        assert!(read(&mirror, 0, 6 * MIB).await.unwrap() == contents);
        mirror.0.stored().await;
        assert!(space.usage().used <= 4 * MIB);
        assert!(space.resize(Some(kept), 0).is_err(), "nothing would be left for what comes");
        space.resize(None, 0).unwrap();
        assert_eq!(space.shortage(), 0);
    });
}
